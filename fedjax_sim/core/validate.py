"""Every check of a user's arguments; all messages name field, value and fix.

Checks run before any compute is spent. They raise `ValueError` (a value out of
range), `TypeError` (a value of another kind) or `KeyError`'s user-facing
cousin `UnknownNameError` (a name that no registry holds).
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fedjax_sim.core.errors import FedjaxSimError

T = TypeVar("T")


class UnknownNameError(FedjaxSimError, ValueError):
  """A name that no registry holds."""


def integer(
  field: str, value: Any, *, ge: int = 1, le: int | None = None
) -> int:
  """Return `value` as an int within [ge, le].

  Raises:
    TypeError: it is not a whole number.
    ValueError: it is out of range.
  """
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise TypeError(
      f"{field}={value!r} is a {type(value).__name__}; give a whole number."
    )
  number = int(value)
  if number < ge or (le is not None and number > le):
    bounds = f">= {ge}" if le is None else f"from {ge} to {le}"
    raise ValueError(
      f"{field}={number} is out of range; give a number {bounds}."
    )
  return number


def number(
  field: str,
  value: Any,
  *,
  ge: float = float("-inf"),
  le: float = float("inf"),
  gt: float | None = None,
  lt: float | None = None,
) -> float:
  """Return `value` as a finite float within [ge, le], > `gt` and < `lt`.

  Raises:
    TypeError: it is not a number.
    ValueError: it is out of range, infinite or NaN.
  """
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise TypeError(
      f"{field}={value!r} is a {type(value).__name__}; give a number."
    )
  value = float(value)
  inside = ge <= value <= le and (gt is None or value > gt)
  inside &= lt is None or value < lt
  if not inside or not math.isfinite(value):
    bounds = [f"> {gt:g}"] if gt is not None else []
    bounds += [f">= {ge:g}"] if math.isfinite(ge) else []
    bounds += [f"<= {le:g}"] if math.isfinite(le) else []
    bounds += [f"< {lt:g}"] if lt is not None else []
    wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise ValueError(f"{field}={value} is out of range; give {wanted}.")
  return value


def boolean(field: str, value: Any) -> bool:
  """Return `value` as True or False.

  Raises:
    TypeError: it is neither.
  """
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(
      f"{field}={value!r} is a {type(value).__name__}; give True or False."
    )
  return bool(value)


def instance(
  field: str, value: Any, kind: type | tuple[type, ...], example: str
) -> None:
  """Refuse a value of another type.

  Args:
    field: what messages call it.
    value: what was given.
    kind: the type, or types.
    example: an expression that gives such a value.

  Raises:
    TypeError: it is none.
  """
  if isinstance(value, kind):
    return
  name = getattr(value, "__name__", None) or f"a {type(value).__name__}"
  raise TypeError(f"{field} is {name}; give for example {example}.")


def image_shape(
  owner: str, shape: tuple[int, ...], *, ge: int
) -> tuple[int, int, int]:
  """`shape`, if it is (height, width, channels), both sides >= `ge`.

  Raises:
    ValueError: it is not.
  """
  if len(shape) != 3 or min(shape[:2]) < ge:
    raise ValueError(
      f"{owner}: an example has shape {shape}; give images, (height, width,"
      f" channels), both sides >= {ge}."
    )
  height, width, channels = shape
  return height, width, channels


def one_of(kind: str, name: str, names: Iterable[str]) -> str:
  """`name` if it is among `names`.

  Raises:
    UnknownNameError: it is not; names the nearest and all valid ones.
  """
  names = sorted(names)
  if name in names:
    return name
  near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise UnknownNameError(
    f"{kind}={name!r} is unknown.{hint} Known: {', '.join(names)}."
  )


def lookup(kind: str, name: str, registry: Mapping[str, T]) -> T:
  """`registry[name]`, or an `UnknownNameError` that lists what there is."""
  return registry[one_of(kind, name, registry)]


def representable(what: str, array: np.ndarray, dtype: Any) -> None:
  """Refuse numbers that would change when they are kept in `dtype`.

  Raises:
    ValueError: a number is beyond the range of `dtype`.
  """
  dtype = np.dtype(dtype)
  if array.dtype == dtype or not array.size or dtype.kind not in "iuf":
    return
  limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
  low, high = array.min(), array.max()
  if low < limits.min or high > limits.max:
    raise ValueError(
      f"{what} goes from {low} to {high}, beyond {dtype.name}; scale it, or"
      " enable JAX's 64-bit mode."
    )


def arguments(
  owner: str, given: Mapping[str, Any], function: Callable[..., Any]
) -> None:
  """Refuse named arguments that `function` would refuse.

  Args:
    owner: what messages call the function.
    given: the arguments.
    function: what will be called.

  Raises:
    UnknownNameError: one that it does not take.
    ValueError: one that it needs is missing.
  """
  parameters = inspect.signature(function).parameters.values()
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  named = {p.name: p.default for p in parameters if p.kind not in variadic}
  if all(p.kind is not p.VAR_KEYWORD for p in parameters):
    for name in given:
      if name not in named:
        raise UnknownNameError(not_taken(owner, name, [*named]))
  for name, default in named.items():
    if default is inspect.Parameter.empty and name not in given:
      raise ValueError(f"{owner} lacks the argument {name!r}; give it.")


def not_taken(
  owner: str,
  name: str,
  names: Sequence[str],
  section: str = "",
  others: Sequence[str] = (),
) -> str:
  """Return the message about an argument that a component does not take.

  Args:
    owner: the component.
    name: the argument.
    names: those that it takes.
    section: of the config, if the argument is one of its fields.
    others: the section's other fields, one of which may have been meant.
  """
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  near = difflib.get_close_matches(name, others, n=1, cutoff=0.75) or near
  prefix = f"{section}." if section else ""
  text = f"{owner} does not take {prefix + name!r}."
  if near:
    text += f" Did you mean {prefix + near[0]!r}?"
  elif section:
    text += f" Unset it, by --config.{section}.{name}=None."
  return f"{text} It takes: {', '.join(sorted(names)) or 'nothing'}."


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """Return each key whose values differ, with both of them."""
  missing = "(missing)"
  return [
    f"{key}: {one.get(key, missing)!r} -> {other.get(key, missing)!r}"
    for key in sorted(one.keys() | other.keys())
    if one.get(key, missing) != other.get(key, missing)
  ]


def cohort(ids: Any, num_clients: int) -> np.ndarray:
  """Return a cohort's ids as int64, shape=(cohort,).

  Raises:
    TypeError: they are not whole numbers in one dimension.
    ValueError: an id twice, or one that no client has.
  """
  ids = np.asarray(ids)
  if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
    raise TypeError(
      f"A cohort has shape {ids.shape} and dtype {ids.dtype}; give a list of"
      " client ids, whole numbers in one dimension."
    )
  ids = ids.astype(np.int64)
  if ids.size and (ids.min() < 0 or ids.max() >= num_clients):
    bad = int(ids[(ids < 0) | (ids >= num_clients)][0])
    raise ValueError(
      f"A cohort names client {bad}; ids go from 0 to {num_clients - 1}."
    )
  sorted_ids = np.sort(ids)
  repeated = sorted_ids[1:] == sorted_ids[:-1]
  if repeated.any():
    twice = sorted_ids[int(np.argmax(repeated))]
    raise ValueError(
      f"A cohort names client {twice} {(ids == twice).sum()} times; give every"
      " id once."
    )
  return ids


def cohorts(
  each: Sequence[Any], num_clients: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return the ids of several cohorts end to end, int64, and their sizes.

  All are looked at together, which for small ones is much faster.

  Raises:
    TypeError, ValueError: as `cohort`, of the first that is none.
  """
  each = [np.asarray(ids) for ids in each]
  if any(ids.ndim != 1 or ids.dtype != np.int64 for ids in each):
    each = [cohort(ids, num_clients) for ids in each]
  sizes = np.array([len(ids) for ids in each])
  ids = np.concatenate(each)
  known = not ids.size or (ids.min() >= 0 and ids.max() < num_clients)
  numbers = np.sort(np.repeat(np.arange(len(each)), sizes) * num_clients + ids)
  if not known or (numbers[1:] == numbers[:-1]).any():
    for some in each:
      cohort(some, num_clients)
  return ids, sizes


def arrays(owner: str, examples: Mapping[str, Any]) -> int:
  """Return the number of examples, on which all fields must agree.

  Raises:
    TypeError: a field is no numpy array of numbers or bools.
    ValueError: no field, or fields of different lengths.
  """
  if not examples:
    raise ValueError(f"{owner}: there is no field; give at least one.")
  lengths: dict[str, int] = {}
  for field, array in examples.items():
    if not isinstance(array, np.ndarray):
      raise TypeError(
        f"{owner}: field {field!r} is a {type(array).__name__}; give a numpy"
        " array."
      )
    if array.dtype.kind not in "biuf" or not array.dtype.isnative:
      why = ", which would need unpickling" if array.dtype.hasobject else ""
      raise TypeError(
        f"{owner}: field {field!r} has dtype {array.dtype}{why}; give native"
        " ints, floats or bools."
      )
    if not array.ndim:
      raise ValueError(
        f"{owner}: field {field!r} is a single number; give one an example."
      )
    lengths[field] = len(array)
  first, length = next(iter(lengths.items()))
  for field, other in lengths.items():
    if other != length:
      raise ValueError(
        f"{owner}: field {first!r} has {length} examples, field {field!r}"
        f" {other}; give every field one entry an example."
      )
  return length


def same_fields(
  owner: str,
  examples: Mapping[str, np.ndarray],
  model_owner: str,
  model: Mapping[str, np.ndarray],
) -> None:
  """Refuse examples whose fields, dtypes or shapes are not the model's.

  Raises:
    ValueError: they differ; names the first field that does.
  """
  if set(examples) != set(model):
    raise ValueError(
      f"{owner} has fields {sorted(examples)}, {model_owner} {sorted(model)};"
      " give both the same."
    )
  for field, array in examples.items():
    one, other = (
      f"{a.dtype} of shape {a.shape[1:]}" for a in (array, model[field])
    )
    if one != other:
      raise ValueError(
        f"{owner}: one {field!r} is {one}, in {model_owner} {other}; give"
        " both the same."
      )
