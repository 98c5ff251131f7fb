"""The discrete Gaussian N_Z(0, s^2): P(x) ~ exp(-x^2 / (2 s^2)), x whole.

Canonne, Kamath and Steinke 2020, arXiv 2004.00010, definition 1. Their sampler
rejects, for as long as it takes; on a device all coordinates would wait for the
last one. Here 96 random bits, a sign and a number of 95, are looked up in a
table of P(|X| > m), which takes the same time for all.

Where s is too large for a table, two draws of one table make one, X = k A + B
(Micciancio and Walter 2017, "Gaussian sampling over the integers", Crypto). Let
t be the parameter of A and B, with s^2 = (k^2 + 1) t^2. Completing the square,

    P(X = x) ~ exp(-x^2 / (2 s^2)) sum over j of exp(-(j - c)^2 / (2 w^2)),

where c = k x / (k^2 + 1) and w = t^2 / s. By Poisson's summation formula the
sum is (2 pi)^(1/2) w, whatever c is, but for a share of 2 exp(-2 pi^2 w^2) and
terms that are far smaller: 1e-34 from w = 2 on.
"""

from __future__ import annotations

import decimal
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_sim.core import Array, Key, validate
from fedjax_sim.privacy import draws

MOST_TABLE = 1024.0  # largest s of a table, which has 11,000 entries then
_LEAST_WIDTH = 2.0  # w
MOST_STDDEV = MOST_TABLE**2 / _LEAST_WIDTH  # of two draws together
_BITS = 95
_TAIL = 10.8  # beyond so many standard deviations there are 135 steps of 2^-95
_BEYOND = 150


def stages(stddev: float) -> tuple[int, float]:
  """Return k and t of X = k A + B; of one table k is 0.

  t is as good as s / (k^2 + 1)^(1/2), and not smaller.

  Args:
    stddev: s, above 0 and at most `MOST_STDDEV`.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  s = validate.number("stddev", stddev, gt=0, le=MOST_STDDEV)
  if s <= MOST_TABLE:
    return 0, s
  k = max(1, math.ceil(math.sqrt((s / MOST_TABLE) ** 2 - 1)))
  return k, math.nextafter(s / math.hypot(k, 1), math.inf)


def reach(stddev: float) -> int:
  """Return the largest number that `sample` gives."""
  k, t = stages(stddev)
  return (k + 1) * _reach(t)


def distance(stddev: float) -> float:
  """Return how far the law of one draw is from the exact one.

  Entries of a table are rounded to 2^-95, of which each sign has a half, and
  what lies beyond its end is left out; with two draws there is also what their
  sum is not Gaussian by.

  Args:
    stddev: as for `sample`.

  Returns:
    A bound of the total variation; 1.5e-25 for a stddev of 1024.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  k, t = stages(stddev)
  table = (_reach(t) / 2 + _BEYOND) * 2.0**-_BITS
  return 2 * table + ripple(t**2 / stddev) if k else table


def ripple(width: float) -> float:
  """Return by what share sums of a Gaussian over whole numbers differ, at most.

  Args:
    width: its standard deviation w, 1 or more.

  Returns:
    A bound of |sum / ((2 pi)^(1/2) w) - 1|, wherever its middle lies.
  """
  return 2.1 * math.exp(-2 * (math.pi * width) ** 2)


def sample(key: Key, stddev: float, shape: tuple[int, ...]) -> Array:
  """Return independent draws from N_Z(0, stddev^2), but for `distance`.

  Args:
    key: of these draws.
    stddev: above 0 and at most `MOST_STDDEV`; not traced, since tables depend
      on it.
    shape: of the result.

  Returns:
    int32.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  k, t = stages(stddev)
  if k == 0:
    return _looked_up(key, t, shape)
  coarse, fine = _looked_up(key, t, (2, *shape))
  return k * coarse + fine


def _reach(stddev: float) -> int:
  """Return the largest number of a table."""
  return math.ceil(_TAIL * stddev) + 1


@functools.lru_cache
def thresholds(stddev: float) -> tuple[int, ...]:
  """Return P(|X| > m) in units of 2^-95, rounded down.

  Args:
    stddev: the parameter s, above 0 and at most `MOST_TABLE`.

  Returns:
    For m from the largest down to 0, rising; zeros are left out.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  stddev = validate.number("stddev", stddev, gt=0, le=MOST_TABLE)
  with decimal.localcontext() as context:
    context.prec = 50
    half = -2 * decimal.Decimal(stddev) ** 2
    weights = [
      2 * (decimal.Decimal(m) ** 2 / half).exp()
      for m in range(_reach(stddev), 0, -1)
    ]
    unit = decimal.Decimal(2**_BITS) / (1 + sum(weights))
    beyond = itertools.accumulate(weight * unit for weight in weights)
    return tuple(entry for entry in map(int, beyond) if entry)


@functools.lru_cache
def _table(stddev: float) -> tuple[np.ndarray, np.ndarray]:
  """Return the thresholds' keys, rising, and their words, (3, entries)."""
  entries = thresholds(stddev)
  words = np.array(
    [[entry >> i & 0xFFFFFFFF for entry in entries] for i in (64, 32, 0)],
    np.uint32,
  )
  with jax.ensure_compile_time_eval():
    keys = np.asarray(_key(*map(jnp.asarray, words)))
  assert np.all(keys[1:] > keys[:-1])
  return keys, words


def _key(high: Array, middle: Array, low: Array) -> Array:
  """Return the place of a three-word number's first 1, and the 25 bits after.

  It rises with the number, and differs between the entries of any table, which
  are whole numbers that grow by 1/2000 or more from each to the next.
  """
  skipped = jnp.where(high > 0, 0, jnp.where(middle > 0, 32, 64))
  first = jnp.where(high > 0, high, jnp.where(middle > 0, middle, low))
  second = jnp.where(high > 0, middle, jnp.where(middle > 0, low, 0))
  zeros = lax.clz(first)
  digits = lax.shift_left(first, zeros)
  digits |= lax.shift_right_logical(second, 32 - zeros)
  size = 96 - skipped.astype(jnp.uint32) - zeros
  return size << 25 | (digits >> 6 & (2**25 - 1))


def _looked_up(key: Key, stddev: float, shape: tuple[int, ...]) -> Array:
  """Return draws as `sample` does, by one table."""
  keys, entries = _table(stddev)
  size = len(keys)
  high, middle, low = draws.words(key, 3, shape)
  negative, words = high >> 31 == 1, (high & (2**31 - 1), middle, low)
  wanted = _key(*words)
  halvings = size.bit_length()
  padded = np.full(2**halvings - 1, 2**32 - 1, np.uint32)
  padded[:size] = keys  # which are less than that

  def halve(i: Array, below: Array) -> Array:
    """Narrow down how many keys are below what is wanted."""
    step = jnp.int32(1) << halvings - 1 - i
    more = jnp.asarray(padded)[below + step - 1] < wanted
    return below + jnp.where(more, step, 0)

  below = lax.fori_loop(0, halvings, halve, jnp.zeros(shape, jnp.int32))
  # Of the next entry alone the key may be the same.
  there = jnp.minimum(below, size - 1)
  above = jnp.zeros(shape, bool)
  for entry, word in zip(entries[::-1], words[::-1], strict=True):
    limit = jnp.asarray(entry)[there]
    above = (limit > word) | ((limit == word) & above)
  magnitude = size - below - ((below < size) & ~above)
  return jnp.where(negative, -magnitude, magnitude)
