"""Whether two rounds are one program: what their parts hold, compared.

A round is built of pure functions, so two rounds whose functions have the same
code and hold the same constants trace to the same program. Numeric
hyper-parameters are traced, so their values do not count, only their names.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_sim.core.digests import digest

_TRACED = "hparams"  # the field of algorithms, transforms, tasks, ... that is


class _Same:
  """Any object, equal to itself alone."""

  def __init__(self, it: object):
    self.it = it

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Same) and self.it is other.it

  def __hash__(self) -> int:
    return id(self.it)


def fingerprint(part: Any) -> Hashable:
  """Return a value that is equal for parts that make the same program.

  Functions are compared by their code and by what they hold (closures,
  defaults), containers by their contents, arrays by digest, and everything
  else by its own equality. Of the field `hparams` of a NamedTuple or a
  dataclass only the names count. Parts that behave alike may still differ, as
  two functions do that were written twice: then there are two programs.

  Args:
    part: such as an `Algorithm`, or a tuple of several parts.

  Example:
    >>> a, b = (fedprox(task, sgd, sgd, mu=mu) for mu in (0.1, 0.2))
    >>> fingerprint(a) == fingerprint(b)
    True
  """
  return _of(part, {})


def _of(x: Any, seen: dict[int, int]) -> Hashable:
  if x is None or isinstance(
    x, bool | int | float | complex | str | bytes | enum.Enum | np.dtype | type
  ):
    return type(x), repr(x) if isinstance(x, float) else x  # 0.0 is not -0.0
  # Parts share much, and a function may hold itself. What was looked at stays
  # alive in the part, so its id is not used again.
  if id(x) in seen:
    return "seen", seen[id(x)]
  seen[id(x)] = len(seen)
  of = functools.partial(_of, seen=seen)
  if isinstance(x, np.ndarray | np.generic | jax.Array):
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(
      x.dtype, jax.dtypes.extended
    ):
      return "key", digest(np.asarray(jax.random.key_data(x)))
    return "array", digest(np.asarray(x))
  if isinstance(x, types.FunctionType):
    cells = tuple(_cell(cell, seen) for cell in x.__closure__ or ())
    held = cells, of(x.__defaults__), of(x.__kwdefaults__)
    return "function", x.__module__, x.__qualname__, x.__code__, held
  if isinstance(x, types.MethodType):
    return "method", of(x.__func__), of(x.__self__)
  if isinstance(x, functools.partial):
    return "partial", of(x.func), of(x.args), of(x.keywords)
  if isinstance(x, tuple) and hasattr(x, "_fields"):
    names: tuple[str, ...] = x._fields
    return type(x), _fields(dict(zip(names, x, strict=True)), seen)
  if isinstance(x, tuple | list):
    return type(x), tuple(of(item) for item in x)
  if isinstance(x, set | frozenset):
    return type(x), frozenset(of(item) for item in x)
  if isinstance(x, Mapping):
    return "mapping", tuple((of(key), of(value)) for key, value in x.items())
  if dataclasses.is_dataclass(x) and not isinstance(x, type):
    own = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return type(x), _fields(own, seen)
  try:
    hash(x)
  except TypeError:
    return _Same(x)
  return x if isinstance(x, Hashable) else _Same(x)


def _cell(cell: types.CellType, seen: dict[int, int]) -> Hashable:
  try:
    return _of(cell.cell_contents, seen)
  except ValueError:  # a name that was never assigned
    return "empty"


def _fields(own: Mapping[str, Any], seen: dict[int, int]) -> Hashable:
  return tuple(
    (name, _names(value) if name == _TRACED else _of(value, seen))
    for name, value in own.items()
  )


def _names(hparams: Any) -> Hashable:
  """Return the structure of hyper-parameters, without their values."""
  return jax.tree.structure(jax.tree.map(lambda _: 0, _plain(hparams)))


def _plain(tree: Any) -> Any:
  """Return nested mappings as dicts, which JAX takes apart."""
  if isinstance(tree, Mapping):
    return {key: _plain(value) for key, value in tree.items()}
  return tree
