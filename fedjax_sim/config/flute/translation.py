"""Translate a YAML file of FLUTE: a row a key, and the fields of our config."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sim.config.flute import absent
from fedjax_sim.config.flute.keys import KEYS
from fedjax_sim.config.flute.rules import (
  COMPATS,
  MEANT,
  STATES,
  USED,
  File,
  Key,
  Outcome,
  idle,
  sets,
)
from fedjax_sim.config.flute.tasks import (
  NETWORKS,
  TASKS,
  FluteTask,
  own_task,
)
from fedjax_sim.core import validate
from fedjax_sim.core.references import is_reference

_NAMES = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "a text",
  list: "a list",
  dict: "a section of keys",
}
_NEEDED = ("strategy", "model_config", "server_config", "client_config")


class Row(NamedTuple):
  """A key of the file, or of FLUTE's defaults, and what becomes of it."""

  path: str
  value: Any
  outcome: Outcome
  is_default: bool = False


@dataclasses.dataclass(frozen=True)
class Translation:
  """A file of FLUTE, translated.

  Attributes:
    task: of the file.
    compat: whose arithmetic it has.
    rows: a row for every key, and those of FLUTE's defaults that matter.
    fields: "section.field" of our config -> its value.
    sources: "section.field" -> the keys that it comes from.
  """

  task: FluteTask
  compat: str
  rows: Sequence[Row]
  fields: Mapping[str, Any]
  sources: Mapping[str, Sequence[str]]

  @property
  def counts(self) -> dict[str, int]:
    """How many keys of the file are used, have no effect, are refused."""
    states = [r.outcome.state for r in self.rows if not r.is_default]
    return {state: states.count(state) for state in STATES}


def translate(
  tree: Mapping[str, Any],
  *,
  task: str | None = None,
  data: str | None = None,
  compat: str = MEANT,
) -> Translation:
  """Translate a file of FLUTE.

  Args:
    tree: what the YAML file holds.
    task: a name of `TASKS`, or a reference to a model of one's own, such as
      "mine.py:model"; None: the folder of `model_config.model_folder`.
    data: a store's path or URL, or the folder of the task's own data set;
      None: the task's own data set, if it has one.
    compat: "meant": the papers' arithmetic, with FLUTE's numbers converted;
      "flute": FLUTE's own, where it differs and can be had.

  Raises:
    UnknownNameError: an unknown key, task or arithmetic.
    TypeError, ValueError: a value of another type, or a key is missing.

  Example:
    translate(read(Path("config.yaml"))).fields["server.rounds"]
  """
  validate.one_of("--compat", compat, COMPATS)
  for name in _NEEDED:
    if not _is_given(tree.get(name)):
      raise ValueError(f"{name} is missing; a FLUTE file has it.")
  chosen = _task(tree["model_config"], task)
  found = list(_walk(tree, _keys(tree, task)))
  values = {path: value for path, _, value in found if _is_given(value)}
  file = File(values, chosen, compat, data)
  if file.task.by_type and "model_config.model_type" not in values:
    raise ValueError(
      f"model_config.model_type is missing; task {file.task.name} has several"
      f" networks: give {NETWORKS}."
    )
  defaults = absent.defaults(file)
  file = dataclasses.replace(
    file, values={**values, **{d.path: d.value for d in defaults}}
  )
  absent.check(file)
  rows = [
    Row(path, value, _outcome(key, value, file)) for path, key, value in found
  ]
  rows += [
    Row(d.path, d.value, _key(d.path).rule(d.value, file), is_default=True)
    for d in defaults
  ]
  fields, sources = _joined(file, rows)
  return Translation(file.task, compat, rows, fields, sources)


def _keys(tree: Mapping[str, Any], task: str | None) -> Mapping[str, Any]:
  """Return the table of keys; further ones are options of an own model."""
  section = tree["model_config"]
  if not (is_reference(task) and isinstance(section, dict)):
    return KEYS
  known = KEYS["model_config"]
  options = {
    name: Key(object, sets(f"model.{name}"))
    for name in section
    if name not in known
  }
  return {**KEYS, "model_config": {**known, **options}}


def _walk(
  tree: Mapping[str, Any], table: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Key, Any]]:
  """Yield the path, the `Key` and the value of every key of the file."""
  for name, value in tree.items():
    path = f"{prefix}{name}"
    if name not in table:
      section = f"{prefix[:-1]}: " if prefix else ""
      validate.one_of(f"{section}key", name, table)
    entry = table[name]
    if isinstance(entry, Key):
      yield path, entry, _checked(path, entry.kind, value)
    elif isinstance(value, dict):
      yield from _walk(value, entry, f"{path}.")
    elif value is not None:
      raise TypeError(
        f"{path}={value!r} is a {type(value).__name__}; give a section of keys."
      )


def _checked(path: str, kind: type, value: Any) -> Any:
  """Return the value as its kind.

  Raises:
    TypeError: it is of another one.
  """
  if not _is_given(value) or kind is object:
    return value
  if kind is float and not isinstance(value, bool):
    number = value
    if not isinstance(value, int):
      with contextlib.suppress(TypeError, ValueError):
        number = float(value)
    if isinstance(number, float) and not math.isfinite(number):
      raise ValueError(f"{path}={value} is out of range; give a finite number.")
    if isinstance(number, int | float):
      return number
  elif isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
    return value
  raise TypeError(
    f"{path}={value!r} is a {type(value).__name__}; give {_NAMES[kind]}."
  )


def _is_given(value: Any) -> bool:
  """Return whether a value says something: no null, no "<add path here>"."""
  placeholder = isinstance(value, str) and value.startswith("<add ")
  return value is not None and not placeholder


def _task(section: Any, name: str | None) -> FluteTask:
  """Return the task of a file, whose `model_config` is given."""
  if name is not None and is_reference(name):
    return own_task(name)
  if name is not None:
    return validate.lookup("--task", name, TASKS)
  folder = section.get("model_folder") if isinstance(section, dict) else None
  own = "for a model of your own --task=FILE.py:FUNCTION"
  if not isinstance(folder, str) or not _is_given(folder):
    raise ValueError(
      "model_config.model_folder is missing, and so is --task; give one of"
      f" them: {', '.join(sorted(TASKS))}, or {own}."
    )
  path = Path(folder)
  name = path.parent.name if path.suffix else path.name
  if name not in TASKS:
    raise validate.UnknownNameError(
      f"task of model_config.model_folder={name!r} is unknown. Known:"
      f" {', '.join(sorted(TASKS))}; {own}."
    )
  return TASKS[name]


def _key(path: str) -> Key:
  """Return the entry of a path in the table."""
  entry: Any = KEYS
  for name in path.split("."):
    entry = entry[name]
  assert isinstance(entry, Key)
  return entry


def _outcome(key: Key, value: Any, file: File) -> Outcome:
  if value is None:
    return idle("null, as if it were not there")
  if not _is_given(value):
    return idle("a placeholder, no path")
  return key.rule(value, file)


def _joined(
  file: File, rows: Sequence[Row]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
  """Return all fields, and where each comes from.

  Raises:
    ValueError: two keys want different values of a field.
  """
  found: dict[str, Any] = {}
  sources: dict[str, list[str]] = {}
  for source, fields in _groups(file, rows):
    for field, value in fields.items():
      if field in found and found[field] != value:
        raise ValueError(
          f"{' and '.join(sources[field])} make {field}={found[field]!r}, and"
          f" {source} makes it {value!r}; leave one out."
        )
      found[field] = value
      sources.setdefault(field, []).append(source)
  return found, sources


def _groups(
  file: File, rows: Sequence[Row]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yield where fields come from, and these fields."""
  task = f"task {file.task.name}"
  yield task, _data(file)
  own = {} if file.task.by_type else file.task.model
  yield task, own
  if file.as_flute:
    yield f"{task}, --compat=flute", file.task.flute
  else:
    yield task, file.task.meant
  for row in rows:
    if row.outcome.state == USED:
      source = f"{row.path} [FLUTE's default]" if row.is_default else row.path
      *others, last = row.outcome.fields.items() or [("", None)]
      yield source, dict(others)
      if last[0]:
        note = f" ({row.outcome.note})" if row.outcome.note else ""
        yield f"{source}{note}", dict([last])


def _data(file: File) -> dict[str, Any]:
  """Return the fields of `data` that the task has."""
  source = file.task.data if file.has_own_data else {"data.name": "store"}
  fields = {**source, **file.task.prepare}
  return fields if file.data is None else {**fields, "data.path": file.data}


def without_data(translation: Translation) -> bool:
  """Return whether the config lacks the path of its store."""
  fields = translation.fields
  return fields["data.name"] == "store" and "data.path" not in fields
