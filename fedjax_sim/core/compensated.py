"""Running sums that keep what float32 rounds away.

float32 counts up to 2^24 = 16,777,216 and then stands still. Here the rounding
error of every addition, which TwoSum gives exactly (Knuth 1969, "The Art of
Computer Programming", volume 2, 4.2.2), is kept in a second number. With u =
2^-24, the two together are off by at most 2 u^2 = 7e-15 of the sum of absolute
values for each term (Hida et al. 2001, "Algorithms for quad-double precision
arithmetic", section 3.2), and whole numbers are exact up to 2^48.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core.types import Array, PyTree


class Total(NamedTuple):
  """A sum in the making, `value + error`.

  Attributes:
    value: leaves of any shape, float32 at least; the sum, rounded.
    error: the same; what the rounding has lost.
  """

  value: PyTree
  error: PyTree


def zeros(like: PyTree) -> Total:
  """Return the sum of no terms of these shapes, in float32 at least."""

  def zero(x: Array) -> Array:
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

  return Total(jax.tree.map(zero, like), jax.tree.map(zero, like))


def add(total: Total, term: PyTree) -> Total:
  """Return the sum with one more term, cast to the sum's dtype."""

  def one(a: Array, lost: Array, b: Array) -> Total:
    rounded, error = _two_sum(a, b.astype(a.dtype))
    return Total(*_two_sum(rounded, lost + error))

  sums = jax.tree.map(one, total.value, total.error, term)
  is_sum = lambda x: isinstance(x, Total)
  part = lambda i: jax.tree.map(lambda x: x[i], sums, is_leaf=is_sum)
  return Total(part(0), part(1))


def rounded(total: Total) -> PyTree:
  """Return the sum, rounded once."""
  return jax.tree.map(jnp.add, total.value, total.error)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
  """Return a + b, rounded, and what the rounding lost: 0 beyond all numbers."""
  s = a + b
  part = s - a  # what of b came in
  lost = (a - (s - part)) + (b - part)
  return s, jnp.where(jnp.isfinite(s), lost, 0)
