"""Whether two rounds are one program: what their parts hold, compared.

A round is built of pure functions, so two rounds whose functions have the same
code and hold the same constants trace to the same program. Numeric
hyper-parameters are traced, so their values do not count, only their names.

What looks alike and is not the same must never be equal here, as its runs would
get the results of others; what is the same and looks different costs a
compilation. A type says by `__fingerprint__()` what of it counts.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_sim.core.digests import digest

TRACED = "hparams"  # the field whose values a program gets as arguments
_PLAIN = (bool, int, complex, str, bytes, enum.Enum, np.dtype)
_WRAPPERS = (type(functools.cache(len)), type(jax.jit(len)))


class _Same:
  """Any object, equal to itself alone."""

  def __init__(self, it: object):
    self.it = it

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Same) and self.it is other.it

  def __hash__(self) -> int:
    return id(self.it)


def fingerprint(part: Any, traced: Collection[type] = ()) -> Hashable:
  """Return a value that is equal for parts that make the same program.

  Functions are compared by their code and by what they hold (closures,
  defaults, attributes), containers by their contents, arrays by digest, and
  everything else by its own equality. Parts that behave alike may still differ,
  as two functions do that were written twice: then there are two programs.

  Args:
    part: such as an `Algorithm`, or a tuple of several parts.
    traced: NamedTuples of whose field `hparams` only the names count.

  Example:
    >>> a, b = (fedprox(task, sgd, sgd, mu=mu) for mu in (0.1, 0.2))
    >>> fingerprint(a, [Algorithm]) == fingerprint(b, [Algorithm])
    True
  """
  return _Walk(traced).of(part)


class _Walk:
  """One look at a part and all that it holds.

  Args:
    traced: as in `fingerprint`.
  """

  def __init__(self, traced: Collection[type]):
    self._traced = tuple(traced)
    # Parts share much, and a function may hold itself. What was looked at is
    # kept, or its id might be that of another object later.
    self._seen: dict[int, tuple[int, object]] = {}

  def of(self, x: Any) -> Hashable:
    """Return the fingerprint of an object."""
    if x is None or type(x) in _PLAIN or isinstance(x, enum.Enum | np.dtype):
      return type(x), x
    if type(x) is float:
      return float, repr(x)  # 0.0 is not -0.0, and NaN is NaN
    if isinstance(x, type | types.ModuleType | types.BuiltinFunctionType):
      return _Same(x)
    if id(x) in self._seen:
      return "seen", self._seen[id(x)][0]
    self._seen[id(x)] = len(self._seen), x
    return type(x), self._content(x)

  def _content(self, x: Any) -> Hashable:
    """Return what counts of an object besides its type."""
    own: Callable[[], Any] | None = getattr(x, "__fingerprint__", None)
    if own is not None:
      return self.of(own())
    if isinstance(x, np.ndarray | np.generic):
      return digest(np.asarray(x))
    if isinstance(x, jax.Array):
      return self._array(x)
    if isinstance(x, types.FunctionType):
      return self._function(x)
    if isinstance(x, types.MethodType):
      return self.of(x.__func__), self.of(x.__self__)
    if isinstance(x, types.CellType):
      return self._cell(x)
    if isinstance(x, functools.partial):
      return self.of(x.func), self.of(x.args), self.of(x.keywords)
    if isinstance(x, _WRAPPERS):
      return self.of(getattr(x, "__wrapped__"))  # noqa: B009
    if isinstance(x, tuple | list):
      return self._sequence(x), self._attributes(x)
    if isinstance(x, set | frozenset):
      return frozenset(self.of(item) for item in x), self._attributes(x)
    if isinstance(x, Mapping):
      items = tuple((self.of(key), self.of(x[key])) for key in x)
      return items, self._attributes(x)
    if dataclasses.is_dataclass(x):
      return self._attributes(x, [f.name for f in dataclasses.fields(x)])
    try:
      hash(x)
    except TypeError:
      return _Same(x)
    equality: Hashable = x
    return equality

  def _array(self, x: jax.Array) -> Hashable:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
      return str(x.dtype), digest(np.asarray(jax.random.key_data(x)))
    return digest(np.asarray(x)), x.weak_type

  def _function(self, x: types.FunctionType) -> Hashable:
    held = x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__
    return x.__module__, x.__qualname__, x.__code__, self.of(held)

  def _cell(self, cell: types.CellType) -> Hashable:
    try:
      return self.of(cell.cell_contents)
    except ValueError:  # a name that was never assigned
      return "empty"

  def _sequence(self, x: tuple[Any, ...] | list[Any]) -> Hashable:
    names = getattr(x, "_fields", range(len(x)))
    is_traced = isinstance(x, self._traced)
    return tuple(
      _names(item) if is_traced and name == TRACED else self.of(item)
      for name, item in zip(names, x, strict=True)
    )

  def _attributes(self, x: Any, names: Collection[str] = ()) -> Hashable:
    """Return the fields of these names, and all other attributes."""
    found = dict.fromkeys([*names, *getattr(x, "__dict__", {})])
    return tuple(
      (name, self.of(getattr(x, name, None))) for name in sorted(found)
    )


def _names(hparams: Any) -> Hashable:
  """Return the structure of hyper-parameters, without their values."""
  if isinstance(hparams, Mapping):
    return tuple((key, _names(hparams[key])) for key in sorted(hparams))
  return np.shape(hparams)
