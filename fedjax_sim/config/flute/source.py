"""Write a translation: the config file, and the table of its keys."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from fedjax_sim.config.defaults import LABELED_SECTIONS
from fedjax_sim.config.flute.rules import IDLE, REFUSED, USED
from fedjax_sim.config.flute.translation import Row, Translation
from fedjax_sim.config.statements import assignment, literal

_WIDTH = 80
_TITLE = "a file of FLUTE, translated."
_ORDER = ("seed", "data", "model", "algorithm", "client", "server")


def is_config_file(text: str) -> bool:
  """Return whether a text is what `config_file` made, changed or not."""
  return text.startswith('"""') and _TITLE in " ".join(text.split())


def config_file(translation: Translation, name: str) -> str:
  """Return a config file whose every line says which key it comes from.

  Args:
    translation: of a file of FLUTE.
    name: of that file.
  """
  counts = translation.counts
  told = ", ".join(f"{n} {state}" for state, n in counts.items())
  lines = [
    *_wrapped(f'"""{name}, {_TITLE}', "", ""),
    "",
    *_wrapped(
      f"Task {translation.task.name}, arithmetic"
      f" {translation.compat!r}; {sum(counts.values())} keys: {told}.",
      "",
      "",
    ),
    '"""',
    "",
    "from ml_collections import ConfigDict",
    "",
    "from fedjax_sim.config import default_config",
    "",
    "",
    'def get_config(arg: str = "") -> ConfigDict:',
    '  """Return the config."""',
    "  config = default_config()",
  ]
  made = set()
  for field in sorted(translation.fields, key=_position):
    section, _, rest = field.partition(".")
    label = rest.partition(".")[0]
    if section in LABELED_SECTIONS and (section, label) not in made:
      made.add((section, label))
      lines.append(f"  config.{section}.{label} = ConfigDict()")
    statement = "  " + assignment(field, translation.fields[field])
    origin = ", ".join(translation.sources[field])
    lines += _commented(statement, origin)
  for state, title in (
    (USED, "Used, without a field here"),
    (IDLE, "Without effect"),
    (REFUSED, "Refused"),
  ):
    rows = [row for row in translation.rows if row.outcome.state == state]
    rows = [row for row in rows if not row.outcome.fields]
    if rows:
      lines += ["", f"  # {title}:"]
    for row in rows:
      text = f"{row.path}: {_shown(row.value)} ({row.outcome.note})"
      lines += _wrapped(text, "  # - ", "  #   ")
  return "\n".join([*lines, "  return config", ""])


def _position(field: str) -> tuple[int, bool]:
  """Return where a field stands in a file; sorting keeps the rest."""
  section, _, key = field.partition(".")
  place = _ORDER.index(section) if section in _ORDER else len(_ORDER)
  return place, key != "name"


def _commented(statement: str, comment: str) -> list[str]:
  """Return a statement with a comment, behind or above it."""
  line = f"{statement}  # {comment}"
  if len(line) <= _WIDTH:
    return [line]
  return [*_wrapped(comment, "  # ", "  # "), statement]


def _wrapped(text: str, first: str, others: str) -> list[str]:
  return textwrap.wrap(
    text,
    _WIDTH,
    initial_indent=first,
    subsequent_indent=others,
    break_long_words=False,
    break_on_hyphens=False,
  )


def table(translation: Translation) -> str:
  """Return the table of all keys, with what becomes of each, and counts."""
  rows = [row for row in translation.rows if not row.is_default]
  added = [row for row in translation.rows if row.is_default]
  counts = translation.counts
  told = ", ".join(f"{n} {state}" for state, n in counts.items())
  lines = [*_lines(rows), "", f"{len(rows)} keys: {told}"]
  if added:
    lines += ["", "FLUTE's defaults of keys that are not in the file:"]
    lines += _lines(added)
  return "\n".join(lines)


def _lines(rows: Sequence[Row]) -> Iterator[str]:
  """Yield the lines of rows, in columns."""
  cells = [(row.path, _shown(row.value), _result(row)) for row in rows]
  widths = [max(len(cell[i]) for cell in cells) for i in range(2)]
  widths[1] = min(widths[1], 24)
  for path, value, result in cells:
    if len(value) > widths[1]:
      value = f"{value[: widths[1] - 3]}..."
    yield f"{path:<{widths[0]}}  {value:<{widths[1]}}  {result}"


def _shown(value: Any) -> str:
  """Return a value as YAML has it, in one line."""
  if isinstance(value, str):
    return " ".join(value.split())
  return json.dumps(value, default=str)


def _result(row: Row) -> str:
  """Return what becomes of a key: fields and values, or why there are none."""
  state, fields, note = row.outcome
  if state != USED:
    return f"{state}: {note}"
  if not fields:
    return f"used: {note}"
  text = ", ".join(f"{k}={literal(v)}" for k, v in fields.items())
  return f"{text} ({note})" if note else text
