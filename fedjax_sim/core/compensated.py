"""Running sums that keep what float32 rounds away.

float32 counts up to 2^24 = 16,777,216 and then stands still. Here the rounding
error of every addition, which TwoSum gives exactly (Knuth 1969, "The Art of
Computer Programming", volume 2, 4.2.2), is kept in a second number. With u =
2^-24, the two together are off by at most 2 u^2 = 7e-15 of the sum of absolute
values for each term (Hida et al. 2001, "Algorithms for quad-double precision
arithmetic", section 3.2), and whole numbers are exact up to 2^48.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
  """A sum in the making, and what the rounding has lost; `parts` shows them.

  On a CPU scalars of one dtype lie in one array: an operation for each would
  take longer than the addition. On a GPU one kernel adds up all scalars, and
  the array's parts would have to be joined by two more.

  Attributes:
    scalars: dtype, float32 at least -> shape=(2, scalars); sums and losses.
    arrays: for every other leaf its sum and what it has lost; all leaves off
      the CPU.
    structure: of what is summed.
    dtypes: for every leaf of it, its dtype in `scalars`; None for an array.
  """

  scalars: dict[str, Array]
  arrays: list[tuple[Array, Array]]
  structure: Any = dataclasses.field(metadata={"static": True})
  dtypes: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})


def zeros(like: PyTree) -> Total:
  """Return the sum of no terms of these shapes, in float32 at least."""
  leaves, structure = jax.tree.flatten(like)
  wide = [jnp.promote_types(x.dtype, jnp.float32) for x in leaves]
  typed = list(zip(leaves, wide, strict=True))
  together = jax.default_backend() == "cpu"
  dtypes = tuple(
    dtype.name if together and not x.shape else None for x, dtype in typed
  )
  scalars = {
    dtype: jnp.zeros((2, dtypes.count(dtype)), dtype)
    for dtype in dtypes
    if dtype is not None
  }
  zero = [
    jnp.zeros(x.shape, dtype)
    for (x, dtype), kind in zip(typed, dtypes, strict=True)
    if kind is None
  ]
  return Total(scalars, [(x, x) for x in zero], structure, dtypes)


def add(total: Total, term: PyTree) -> Total:
  """Return the sum with one more term, cast to the sum's dtype.

  Args:
    total: without leading axes; inside of `jax.vmap` it has none.
    term: as `zeros` was given, and of these shapes.
  """
  terms = total.structure.flatten_up_to(term)
  typed = list(zip(terms, total.dtypes, strict=True))
  scalars = {}
  for dtype, (value, lost) in total.scalars.items():
    added = [jnp.asarray(x, dtype) for x, kind in typed if kind == dtype]
    scalars[dtype] = jnp.stack(_added(value, lost, jnp.stack(added)))
  rest = [x for x, kind in typed if kind is None]
  arrays = [
    _added(value, lost, jnp.asarray(x, value.dtype))
    for (value, lost), x in zip(total.arrays, rest, strict=True)
  ]
  return dataclasses.replace(total, scalars=scalars, arrays=arrays)


def parts(total: Total) -> tuple[PyTree, PyTree]:
  """Return the sum, rounded, and what it has lost.

  Args:
    total: on the host or not; of `jax.vmap` it may have leading axes.
  """

  def part(i: int) -> PyTree:
    arrays = iter([pair[i] for pair in total.arrays])
    scalars = {
      dtype: iter([x[..., i, n] for n in range(x.shape[-1])])
      for dtype, x in total.scalars.items()
    }
    leaves = [
      next(arrays if dtype is None else scalars[dtype])
      for dtype in total.dtypes
    ]
    return jax.tree.unflatten(total.structure, leaves)

  return part(0), part(1)


def rounded(total: Total) -> PyTree:
  """Return the sum, rounded once."""
  value, lost = parts(total)
  return jax.tree.map(jnp.add, value, lost)


def _added(value: Array, lost: Array, term: Array) -> tuple[Array, Array]:
  """Return a sum with one more term, rounded, and what it has lost."""
  together, error = _two_sum(value, term.astype(value.dtype))
  return _two_sum(together, lost + error)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
  """Return a + b, rounded, and what the rounding lost: 0 beyond all numbers."""
  s = a + b
  part = s - a  # what of b came in
  lost = (a - (s - part)) + (b - part)
  return s, jnp.where(jnp.isfinite(s), lost, 0)
