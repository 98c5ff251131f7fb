"""Which fields of a source a store gets, and of which dtype."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_sim.core import validate

# What devices compute with, unless they are told otherwise.
_NARROW: Mapping[str, str] = {
  "float64": "float32",
  "int64": "int32",
  "uint64": "int32",
  "uint32": "int32",
}


def columns_of(
  where: str,
  columns: Sequence[str],
  client: str,
  fields: Mapping[str, str] | None,
) -> list[str]:
  """Return the columns of a table that are read, that of the client first.

  Raises:
    ValueError: a column is missing, or there twice; names those that there are.
  """
  if client not in columns:
    raise ValueError(
      f"{where}: there is no column {client!r} to name the client; there are"
      f" {few(columns)}."
    )
  twice = sorted({c for c in columns if columns.count(c) > 1})
  if twice:
    raise ValueError(
      f"{where}: there are several columns {twice[0]!r}; give each a name of"
      " its own."
    )
  others = [c for c in columns if c != client]
  wanted = others if fields is None else wanted_of(where, others, fields)
  return [client, *wanted]


def wanted_of(
  where: str, names: Iterable[str], fields: Mapping[str, str]
) -> list[str]:
  """Return the source's fields that `fields` asks for, each once.

  Raises:
    ValueError: see `assigned`.
  """
  found = assigned(where, list(names), fields).values()
  return list(dict.fromkeys(name for parts in found for name in parts))


def assigned(
  where: str, names: Sequence[str], fields: Mapping[str, str]
) -> dict[str, list[str]]:
  """Return which of a source's fields each field of a store is made of.

  A pattern takes nothing that another field asks for by name, so that no label
  gets among the inputs; "*" is whatever no other field takes.

  Args:
    where: for messages.
    names: the source's fields.
    fields: field -> a name, or several joined by "+", each a name or a pattern
      such as "pixel*".

  Raises:
    ValueError: a name is missing, a pattern finds nothing, or patterns of two
      fields find the same; names those that there are.
  """
  parts = {
    field: [value] if value in names else value.split("+")
    for field, value in fields.items()
  }
  strength: dict[str, int] = {}  # of what takes each name: the less, the more
  for part in itertools.chain(*parts.values()):
    for name in _matching(where, names, part):
      strength[name] = min(strength.get(name, 2), _strength(part, names))
  found: dict[str, list[str]] = {}
  owner: dict[str, str] = {}
  for field, patterns in parts.items():
    own: dict[str, None] = {}
    for part in patterns:
      level = _strength(part, names)
      matching = _matching(where, names, part)
      left = [name for name in matching if strength[name] == level]
      if not left and not set(matching) & set(own):
        raise ValueError(
          f"{where}: other fields take all that {part!r} finds,"
          f" {few(matching)}; leave {field} out, or name others for it."
        )
      for name in left:
        if level and owner.setdefault(name, field) != field:
          raise ValueError(
            f"{where}: {name!r} is in a pattern of {owner[name]} and in one of"
            f" {field}; name it in one of them, or make one narrower."
          )
      own |= dict.fromkeys(left)
    found[field] = list(own)
  return found


def _strength(part: str, names: Sequence[str]) -> int:
  return 0 if part in names else 2 if part == "*" else 1


def chosen(
  where: str,
  examples: Mapping[str, np.ndarray],
  fields: Mapping[str, str] | None,
  row: int | None = None,
) -> dict[str, np.ndarray]:
  """Return a store's fields, made of those of a source.

  Args:
    where: for messages.
    examples: the source's fields, (examples, ...) each.
    fields: see `assigned`; several become one array, (examples, ..., fields);
      None: all of them.
    row: the number of the first example in the source, for messages.

  Raises:
    ValueError: one is missing, or several do not fit together.
  """
  if fields is None:
    return dict(examples)
  found = {}
  for field, names in assigned(where, list(examples), fields).items():
    parts = [examples[name] for name in names]
    if names == [fields[field]]:
      found[field] = parts[0]
      continue
    _check_parts(where, field, dict(zip(names, parts, strict=True)), row)
    found[field] = np.stack(parts, axis=-1)
  return found


def _check_parts(
  where: str,
  field: str,
  parts: Mapping[str, np.ndarray],
  row: int | None,
) -> None:
  """Refuse parts that cannot be one array; name the first that does not fit."""
  shape = next(iter(parts.values())).shape
  for name, part in parts.items():
    if part.dtype.kind not in "biuf":
      at, value = not_a_number(part)
      place = f"row {row + at}" if row is not None else f"entry {at}"
      raise ValueError(
        f"{where}: {name!r}, which is among those of {field}, holds"
        f" {value!r:.60} in {place}, which is no number; fill it in, leave that"
        f" out, or name for {field} others alone."
      )
    if part.shape != shape:
      raise ValueError(
        f"{where}: {name!r}, which is among those of {field}, has shape"
        f" {part.shape}, others {shape}; name those of one shape."
      )


def not_a_number(values: np.ndarray) -> tuple[int, Any]:
  """Return the place and value of the first text that is no number.

  Args:
    values: shape=(n, ...), of dtype object; if all are numbers, with a point or
      a comma, the first is returned.
  """
  flat = values.reshape(len(values), -1)
  for i, row in enumerate(flat.tolist()):
    for value in row:
      try:
        float(value.replace(",", ".") if isinstance(value, str) else value)
      except (TypeError, ValueError):
        return i, value
  return 0, flat[0, 0] if flat.size else ""


def _matching(where: str, names: Sequence[str], part: str) -> list[str]:
  found = [part] if part in names else fnmatch.filter(names, part)
  if not found:
    raise ValueError(
      f"{where}: there is no field {part!r}; there are {few(names)}."
    )
  return found


def few(names: Sequence[str], most: int = 20) -> str:
  """Join names by commas, at most `most`, for messages."""
  return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def converted(
  where: str,
  field: str,
  values: np.ndarray,
  dtype: str | None,
  place: Callable[[int], str],
) -> np.ndarray:
  """Convert numbers to a dtype, unless that would change whole numbers.

  Args:
    where: for messages.
    field: for messages.
    values: numbers, shape=(examples, ...).
    dtype: "uint8", say; None: float32 for float64, int32 for int64 and for
      unsigned ones beyond 16 bits, else as it is.
    place: number of an example -> whose it is, for messages.

  Returns:
    The same numbers; fractions are rounded to what the dtype has.

  Raises:
    ValueError: a value is no number, or does not fit; names it and the field.
  """
  if values.dtype.hasobject:
    at, value = not_a_number(values)
    how = "text (characters or words), or " if field == "x" else ""
    raise ValueError(
      f"{where}: field {field!r} holds text, first {value!r:.60} in"
      f" {place(at)}; fill in a number, turn text into numbers with {how}a map"
      " of your own, or leave the field out."
    )
  if values.dtype.kind not in "biuf":
    raise ValueError(
      f"{where}: field {field!r} holds {values.dtype}, such as"
      f" {values.flat[0]} in {place(0)}; give numbers that are real."
    )
  name = dtype or _NARROW.get(values.dtype.name, values.dtype.name)
  validate.one_of(f"{where}: field {field!r}: dtype", name, DTYPES)
  target = np.dtype(name)
  wrong = _changed(values, target)
  if wrong.any():
    told = values[wrong].flat[0]
    raise ValueError(
      f"{where}: field {field!r} holds {told}, which is no {target}; give the"
      " field another dtype, such as"
      f" dtypes={field}:{_wider(values.dtype, target)}."
    )
  with np.errstate(over="ignore"):  # infinity is refused when it is written
    return values.astype(target, copy=False)


def _changed(values: np.ndarray, target: np.dtype[Any]) -> np.ndarray:
  """Return a mask of numbers that `target` changes, but rounded fractions."""
  given = values.dtype.kind
  if target == values.dtype or given == "b":
    return np.zeros(values.shape, bool)
  if given + target.kind == "ff":
    # Beyond 2**53 every number is whole, by rounding.
    whole = (np.abs(values) < 2.0**53) & (values == np.rint(values))
    with np.errstate(over="ignore", invalid="ignore"):
      return whole & (values.astype(target).astype(values.dtype) != values)
  if target.kind == "b":
    return ~np.isin(values, (0, 1))
  if target.kind == "f":
    most = 2 ** (np.finfo(target).nmant + 1)  # up to here a float has them all
    return (values > most) | (values < -most)
  limits = np.iinfo(target)
  if given in "iu":
    return (values < limits.min) | (values > limits.max)
  fits = (values >= float(limits.min)) & (values < float(limits.max + 1))
  return ~(fits & (values == np.rint(values)))


def _wider(given: np.dtype[Any], target: np.dtype[Any]) -> str:
  if target.kind == "f":
    return "float64"
  return "float32" if given.kind == "f" else "int64"


def check_dtypes(dtypes: Mapping[str, str]) -> None:
  """Refuse dtypes that are not of numbers.

  Raises:
    ValueError: a dtype is not of numbers; names the field and the dtype.
  """
  for field, name in dtypes.items():
    validate.one_of(f"dtypes: {field}", name, DTYPES)


DTYPES = (
  "bool",
  "uint8",
  "uint16",
  "uint32",
  "int8",
  "int16",
  "int32",
  "int64",
  "float16",
  "float32",
  "float64",
)
