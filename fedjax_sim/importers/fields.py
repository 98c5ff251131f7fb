"""Which fields of a source a store gets, and of which dtype."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_sim import validate

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
  """The columns of a table that are read, that of the client first.

  Raises:
    ValueError: one is missing; names those that there are.
  """
  if client not in columns:
    raise ValueError(
      f"{where}: there is no column {client!r} to name the client; there are"
      f" {_few(columns)}."
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
  """Those of a source's fields that `fields` asks for, each once.

  Raises:
    ValueError: one is missing; names those that there are.
  """
  names = list(names)
  wanted = [
    name
    for pattern in fields.values()
    for name in _matching(where, names, pattern)
  ]
  return list(dict.fromkeys(wanted))


def chosen(
  where: str,
  examples: Mapping[str, np.ndarray],
  fields: Mapping[str, str] | None,
) -> dict[str, np.ndarray]:
  """The fields of a store.

  Args:
    where: for messages.
    examples: the source's fields, (examples, ...) each.
    fields: field -> the source's, or a pattern of several that become one
      array, (examples, ..., fields); None: all of them.

  Raises:
    ValueError: one is missing, or several do not fit together.
  """
  if fields is None:
    return dict(examples)
  found = {}
  for field, pattern in fields.items():
    names = _matching(where, list(examples), pattern)
    parts = [examples[name] for name in names]
    if names == [pattern]:
      found[field] = parts[0]
      continue
    if any(
      p.dtype.kind not in "biuf" or p.shape != parts[0].shape for p in parts
    ):
      raise ValueError(
        f"{where}: {pattern!r} names {_few(names)}, which are no numbers of one"
        f" shape; name others as {field}."
      )
    found[field] = np.stack(parts, axis=-1)
  return found


def _matching(where: str, names: Sequence[str], pattern: str) -> list[str]:
  if pattern in names:
    return [pattern]
  found = fnmatch.filter(names, pattern)
  if not found:
    raise ValueError(
      f"{where}: there is no field {pattern!r}; there are {_few(names)}."
    )
  return found


def _few(names: Sequence[str], most: int = 20) -> str:
  return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def converted(
  where: str, field: str, values: np.ndarray, dtype: str | None
) -> np.ndarray:
  """Numbers of another dtype, unless that would change whole numbers.

  Args:
    where: for messages.
    field: for messages.
    values: numbers, (examples, ...).
    dtype: "uint8", say; None: float32 for float64, int32 for int64 and for
      unsigned ones beyond 16 bits, else as it is.

  Returns:
    The same numbers; fractions are rounded to what the dtype has.

  Raises:
    ValueError: it is no number, or does not fit; names the field and a value.
  """
  if values.dtype.kind not in "biuf":
    how = "text (characters or words), or " if field == "x" else ""
    raise ValueError(
      f"{where}: field {field!r} holds text; turn it into numbers with {how}a"
      " map of your own, or leave it out."
    )
  name = dtype or _NARROW.get(values.dtype.name, values.dtype.name)
  validate.known(f"{where}: field {field!r}: dtype", name, DTYPES)
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
  """Which numbers would not be the same, but for rounded fractions."""
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
  """Refuses dtypes of no numbers.

  Raises:
    ValueError: names the field and the dtype.
  """
  for field, name in dtypes.items():
    validate.known(f"dtypes: {field}", name, DTYPES)


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
