"""The k-th largest of many numbers, without a sort, and the k largest ones.

k is traced. The bits of a number >= 0 are ordered as the numbers are, so that
the k-th is found bit after bit, by counting: a sort takes over 10 times as long
on a CPU, and would put together arrays that are sharded.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Array


def ordered_bits(magnitudes: Array) -> Array:
  """Return whole numbers in the order of floats >= 0, of their shape."""
  int_ = jnp.dtype(f"int{8 * magnitudes.dtype.itemsize}")
  return lax.bitcast_convert_type(magnitudes, int_)


def at_rank(numbers: Sequence[Array], rank: Array) -> Array:
  """Return the number that so many of all arrays' numbers are not above.

  Args:
    numbers: whole numbers >= 0 of one signed dtype.
    rank: shape=(), int32, from 0: the least, to the number of entries less 1.

  Returns:
    shape=(), of the arrays' dtype.
  """
  int_ = numbers[0].dtype
  width = 8 * int_.itemsize

  def set_bit(i: Array, found: Array) -> Array:
    more = found | lax.shift_left(int_.type(1), (width - 2 - i).astype(int_))
    below = sum(jnp.sum(b < more, dtype=jnp.int32) for b in numbers)
    return jnp.where(below <= rank, more, found)

  return lax.fori_loop(0, width - 1, set_bit, int_.type(0))


def largest(numbers: Array, count: Array) -> Array:
  """Return which entries are the `count` largest; of equal ones the first.

  Args:
    numbers: shape=(size,), whole numbers >= 0 of a signed dtype.
    count: shape=(), int32, from 1 to size.

  Returns:
    shape=(size,), bool; exactly `count` are set.
  """
  least = at_rank([numbers], numbers.size - count)
  above, equal = numbers > least, numbers == least
  room = count - jnp.sum(above, dtype=jnp.int32)
  return above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= room))
