"""The discrete Gaussian N_Z(0, s^2): P(x) ~ exp(-x^2 / (2 s^2)), x whole.

Canonne, Kamath and Steinke 2020, arXiv 2004.00010, definition 1. Their sampler
rejects, for as long as it takes; on a device all coordinates would wait for the
last one. Here 96 random bits are looked up in a table of the distribution
function, which takes the same time for all.

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
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_sim import validate
from fedjax_sim.base import Array, Key

MOST_TABLE = 1024.0  # largest s of a table, which has 23,000 entries then
_LEAST_WIDTH = 2.0  # w
MOST_STDDEV = MOST_TABLE**2 / _LEAST_WIDTH  # of two draws together
_WORDS = 3  # random words of 32 bits for a draw from a table
_UNIT = 2.0 ** (-32 * _WORDS)
_TAIL = 11.4  # beyond so many standard deviations there is less than 2^-96


def stages(stddev: float) -> tuple[int, float]:
  """Return k and t of X = k A + B; of one table k is 0.

  t is as good as s / (k^2 + 1)^(1/2), and not smaller.

  Args:
    stddev: s, above 0 and at most `MOST_STDDEV`.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  s = validate.real("stddev", stddev, above=0, most=MOST_STDDEV)
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

  Entries of a table are rounded to 2^-96, and what lies beyond its end is left
  out; of two draws together there is what their sum is not Gaussian by.

  Args:
    stddev: as for `sample`.

  Returns:
    A bound of the total variation; 1.5e-25 for a stddev of 1024.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  k, t = stages(stddev)
  table = (_reach(t) + 2) * _UNIT
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
  coarse, fine = jax.random.split(key)
  return k * _looked_up(coarse, t, shape) + _looked_up(fine, t, shape)


def _reach(stddev: float) -> int:
  """Return the largest number of a table."""
  return math.ceil(_TAIL * stddev) + 1


@functools.lru_cache
def thresholds(stddev: float) -> np.ndarray:
  """Return the distribution function in units of 2^-96, rounded down.

  Args:
    stddev: the parameter s, above 0 and at most `MOST_TABLE`.

  Returns:
    shape=(3, 2 reach), uint32; P(X <= x) for x from -reach to reach - 1, the
    upper bits first.

  Raises:
    TypeError, ValueError: stddev is out of range.
  """
  stddev = validate.real("stddev", stddev, above=0, most=MOST_TABLE)
  one = 1 << 32 * _WORDS
  with decimal.localcontext() as context:
    context.prec = 50
    double = 2 * decimal.Decimal(stddev) ** 2
    half = [
      (-(decimal.Decimal(x) ** 2) / double).exp()
      for x in range(_reach(stddev) + 1)
    ]
    weights = half[:0:-1] + half
    unit = decimal.Decimal(one) / sum(weights)
    running, table = decimal.Decimal(0), bytearray()
    for weight in weights[:-1]:
      running += weight
      table += min(int(running * unit), one - 1).to_bytes(4 * _WORDS, "big")
  words = np.frombuffer(bytes(table), ">u4").astype(np.uint32)
  return np.ascontiguousarray(words.reshape(-1, _WORDS).T)


def _looked_up(key: Key, stddev: float, shape: tuple[int, ...]) -> Array:
  """Return draws by a table; as `sample`."""
  table = thresholds(stddev)
  size = table.shape[1]
  words = jax.random.bits(key, (_WORDS, *shape), jnp.uint32)

  def narrow(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    """Halve [first, last], where the first threshold above the bits is."""
    first, last = bounds
    middle = (first + last) // 2
    there = jnp.minimum(middle, size - 1)
    above = jnp.zeros(shape, bool)
    for limits, word in zip(table[::-1], words[::-1], strict=True):
      limit = jnp.asarray(limits)[there]
      above = (limit > word) | ((limit == word) & above)
    found = middle == last  # nothing is left to halve
    move = ~above & ~found
    return jnp.where(move, middle + 1, first), jnp.where(above, middle, last)

  start = jnp.zeros(shape, jnp.int32), jnp.full(shape, size, jnp.int32)
  index, _ = lax.fori_loop(0, size.bit_length(), narrow, start)
  return index - _reach(stddev)
