"""The discrete Gaussian N_Z(0, s^2): P(x) ~ exp(-x^2 / (2 s^2)), x whole.

Canonne, Kamath and Steinke 2020, arXiv 2004.00010, definition 1. Their sampler
rejects, for as long as it takes; on a device all coordinates would wait for the
last one. Here 64 random bits are looked up in a table of the distribution
function, which takes the same time for all.
"""

from __future__ import annotations

import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_sim import validate
from fedjax_sim.base import Array, Key

MOST_STDDEV = 1024.0  # a table of 19,000 entries
_TAIL = 9.5  # beyond so many standard deviations there is less than 2^-64


def reach(stddev: float) -> int:
  """The largest number that `sample` gives."""
  return math.ceil(_TAIL * stddev) + 1


@functools.lru_cache
def thresholds(stddev: float) -> np.ndarray:
  """The distribution function in units of 2^-64, rounded down.

  Args:
    stddev: the parameter s, above 0 and at most `MOST_STDDEV`.

  Returns:
    shape=(2 reach,), uint64; P(X <= x) for x from -reach to reach - 1.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  stddev = validate.real("stddev", stddev, above=0, most=MOST_STDDEV)
  most = reach(stddev)
  with decimal.localcontext() as context:
    context.prec = 40
    double = 2 * decimal.Decimal(stddev) ** 2
    half = [
      (-(decimal.Decimal(x) ** 2) / double).exp() for x in range(most + 1)
    ]
    weights = half[:0:-1] + half
    unit = decimal.Decimal(2**64) / sum(weights)
    running, result = decimal.Decimal(0), []
    for weight in weights[:-1]:
      running += weight
      result.append(min(int(running * unit), 2**64 - 1))
  return np.array(result, np.uint64)


def sample(key: Key, stddev: float, shape: tuple[int, ...]) -> Array:
  """Independent draws from N_Z(0, stddev^2).

  The law of one differs from the exact one by at most
  (reach + 2) 2^-64 in total variation: thresholds are rounded to 2^-64, and
  what lies beyond `reach` is left out. For a stddev of 1024 that is 5.3e-16.

  Args:
    key: of these draws.
    stddev: not traced, since the table depends on it.
    shape: of the result.

  Returns:
    int32.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  table = thresholds(stddev)
  high = jnp.asarray((table >> np.uint64(32)).astype(np.uint32))
  low = jnp.asarray(table.astype(np.uint32))
  upper, lower = jax.random.bits(key, (2, *shape), jnp.uint32)

  def narrow(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    """Halves [first, last], where the first threshold above the bits is."""
    first, last = bounds
    middle = (first + last) // 2
    there = jnp.minimum(middle, len(table) - 1)
    above = (high[there] > upper) | (
      (high[there] == upper) & (low[there] > lower)
    )
    found = middle == last  # nothing is left to halve
    move = ~above & ~found
    return jnp.where(move, middle + 1, first), jnp.where(above, middle, last)

  start = jnp.zeros(shape, jnp.int32), jnp.full(shape, len(table), jnp.int32)
  steps = len(table).bit_length()
  index, _ = lax.fori_loop(0, steps, narrow, start)
  return index - reach(stddev)
