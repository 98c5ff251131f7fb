"""The points of a study: which fields take which values, together.

A point is a mapping from fields such as `client.learning_rate` to texts, as
the command line has them. A grid takes all combinations, a random search draws
some, and a list names them.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedjax_sim.config.fields import words
from fedjax_sim.config.flags import UsageError

Point = dict[str, str]
SEED = "seed"  # varied by `--seeds`

_SPACED = ("linear", "log")  # (first, last, count)
_DRAWN = ("uniform", "loguniform")  # (least, greatest)
_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


def grid(vary: Mapping[str, str]) -> list[Point]:
  """Return all combinations of the values of each field.

  Args:
    vary: field -> its values: a list such as "fedavg,fedprox",
      "linear(0,1,5)", or "log(0.01,1,5)", whose values are equally spaced
      on a logarithmic scale, both ends among them.

  Raises:
    UsageError: they are no such values, or a distribution, which only a random
      search can draw from.

  Example:
    >>> grid({"client.learning_rate": "log(0.01,1,3)"})
    [{'client.learning_rate': '0.01'}, {'client.learning_rate': '0.1'},
     {'client.learning_rate': '1'}]
  """
  values = []
  for field, text in vary.items():
    kind, _ = _call(text)
    if kind in _DRAWN:
      raise UsageError(
        f"--vary={field}={text}: a grid has no {kind}(...), which is drawn;"
        " give --random=N, or values."
      )
    values.append(_values(field, text))
  return [
    dict(zip(vary, chosen, strict=True))
    for chosen in itertools.product(*values)
  ]


def drawn(vary: Mapping[str, str], count: int, seed: int) -> list[Point]:
  """Draw points at random.

  Args:
    vary: field -> its values, as in `grid`, of which one is chosen; or
      "uniform(0,1)" or "loguniform(0.001,1)".
    count: how many points.
    seed: of the draws; each field has draws of its own, whatever others are
      varied.

  Raises:
    UsageError: they are no such values.
  """
  columns = []
  for field, text in vary.items():
    bits = [seed, *field.encode()]
    rng = np.random.default_rng(bits)
    kind, arguments = _call(text)
    if kind in _DRAWN:
      low, high = _numbers(field, text, arguments, 2)
      _check_ends(field, text, kind, low, high)
      if kind == "loguniform":
        logs = rng.uniform(math.log(low), math.log(high), count)
        column = [_text(x) for x in np.exp(logs)]
      else:
        column = [_text(x) for x in rng.uniform(low, high, count)]
    else:
      values = _values(field, text)
      column = [values[i] for i in rng.integers(len(values), size=count)]
    columns.append(column)
  return [
    dict(zip(vary, row, strict=True)) for row in zip(*columns, strict=True)
  ]


def listed(path: Path) -> list[Point]:
  """Read points from a file.

  Args:
    path: JSON, a list of objects, field -> value; or CSV, whose first line
      names the fields.

  Raises:
    UsageError: it is neither, is empty, or its points have other fields each.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except OSError as error:
    raise UsageError(
      f"--points={path} cannot be read: {error.strerror}; give a file."
    ) from error
  except ValueError as error:
    raise UsageError(f"--points={path} is no text: {error}.") from error
  try:
    if path.suffix == ".csv":
      rows: Iterable[Mapping[str, object]] = list(
        csv.DictReader(text.splitlines(), strict=True)
      )
    else:
      rows = json.loads(text)
      if not isinstance(rows, list):
        raise TypeError("it is no list")
    points = [{k: text_of(v) for k, v in row.items()} for row in rows]
  except (ValueError, AttributeError, TypeError, csv.Error) as error:
    raise UsageError(
      f"--points={path} holds no points ({error}); give a JSON list of objects,"
      " field -> value, or a CSV table with commas and a header."
    ) from error
  if not points:
    raise UsageError(f"--points={path} has no point; give at least one.")
  for i, point in enumerate(points):
    if odd := points[0].keys() ^ point.keys():
      fields = ", ".join(sorted(map(str, odd)))
      raise UsageError(
        f"--points={path}: point {i} and point 0 differ in whether they have"
        f" {fields}; give all the same fields, with null or an empty cell where"
        " the config's value holds."
      )
  return points


def seeds_of(text: str, first: int) -> list[int]:
  """Return the seeds that "5", a number of them, or "3,7,9" stands for.

  Args:
    text: of `--seeds`.
    first: the first of so many.

  Raises:
    UsageError: it is no such number, or a seed comes twice.
  """
  try:
    numbers = [int(word) for word in words(text)]
  except ValueError:
    numbers = []
  wrong = not numbers or len({*numbers}) < len(numbers) or min(numbers) < 0
  if wrong or (numbers == [0] and "," not in text):
    raise UsageError(
      f"--seeds={text}: give how many seeds, such as 5, or the seeds, such as"
      " 3,7,9, each once."
    )
  return numbers if "," in text else list(range(first, first + numbers[0]))


def text_of(value: object) -> str:
  """Return a value as the command line has it; "None" of None."""
  if value is None or value == "":
    return "None"
  if isinstance(value, list | tuple):
    return ",".join(map(text_of, value))
  return value if isinstance(value, str) else json.dumps(value)


def _call(text: str) -> tuple[str, list[str]]:
  """Return the name and the arguments of "log(0.01,1,5)"; "" of a list."""
  found = _CALL.fullmatch(text.strip())
  if found is None or found[1] not in (*_SPACED, *_DRAWN):
    return "", []
  return found[1], list(words(found[2]))


def _values(field: str, text: str) -> list[str]:
  kind, arguments = _call(text)
  if not kind:
    values = list(words(text))
    if ",," in text.replace(" ", "") or text.strip().endswith(","):
      raise UsageError(
        f"--vary={field}={text}: a value is missing between commas."
      )
    if not values:
      raise UsageError(f"--vary={field}={text} names no value; give some.")
    if len({*values}) < len(values):
      raise UsageError(f"--vary={field}={text}: a value comes twice.")
    return values
  first, last, number = _numbers(field, text, arguments, 3)
  if number != int(number) or number < 2:
    raise UsageError(
      f"--vary={field}={text}: give a whole number >= 2 of values."
    )
  _check_ends(field, text, kind, first, last)
  space = np.geomspace if kind == "log" else np.linspace
  return [_text(x) for x in space(first, last, int(number))]


def _numbers(
  field: str, text: str, arguments: Sequence[str], count: int
) -> list[float]:
  try:
    numbers = [float(x) for x in arguments]
  except ValueError:
    numbers = []
  if len(numbers) != count or not all(map(math.isfinite, numbers)):
    shape = "first,last,count" if count == 3 else "least,greatest"
    raise UsageError(f"--vary={field}={text}: give ({shape}), finite numbers.")
  return numbers


def _check_ends(
  field: str, text: str, kind: str, low: float, high: float
) -> None:
  if not low < high:
    raise UsageError(f"--vary={field}={text}: give the smaller end first.")
  if low <= 0 and "log" in kind:
    raise UsageError(
      f"--vary={field}={text}: a logarithmic scale has no {low:g}; begin above"
      " 0."
    )


def _text(x: float) -> str:
  """Return a number in at most 6 digits, so that it reads well in a table."""
  return f"{x:.6g}"
