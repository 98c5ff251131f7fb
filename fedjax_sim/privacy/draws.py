"""Normal and Laplace numbers with tails, from 64 random bits each.

`jax.random.normal` inverts a distribution function at 23 random bits: nothing
it gives is beyond 5.42, and `jax.random.laplace` ends at 16.6. A sum to which
such noise is added betrays, with a probability that no delta below it allows,
that it cannot have come from a neighbor. Here the logarithm of a uniform number
of 64 bits, exact near 0 and near 1, gives an exponential one of up to 45: the
radius of two normal numbers (Box and Muller 1958, "A note on the generation of
random normal deviates"), which reach 9.49, or the magnitude of a Laplace one.

What is beyond has the probability 2^-64; `gaussian_exposure` and
`laplace_exposure` bound what it shows. The numbers are rounded to the dtype, as
is the sum that they are added to, and whoever sees its last bits may learn from
them (Mironov 2012, "On significance of the least significant bits for
differential privacy"): this is noise for simulations.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from fedjax_sim.core import Array, Key
from fedjax_sim.privacy import library

KEPT = 0.999  # of a delta, for mechanisms; a thousandth is the generator's
BEYOND = 2.0**-64  # probability of what a radius, or a magnitude, leaves out
MAGNITUDE = -math.log(BEYOND)  # which is beyond so many scales
RADIUS = math.sqrt(2 * MAGNITUDE)  # or beyond so many standard deviations


def normal(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
  """Return independent standard normal numbers.

  Args:
    key: of these draws.
    shape: of the result.
    dtype: float32 or wider.
  """
  size = math.prod(shape)
  both = _normal_pair(key, ((size + 1) // 2,), dtype)
  return jnp.concatenate(both)[:size].reshape(shape)


def normal_apart(
  key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Array:
  """Return standard normal numbers of twice as many bits, without a reshape.

  So an array that is sharded over several devices stays sharded.
  """
  return _normal_pair(key, shape, dtype)[0]


def _normal_pair(
  key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> tuple[Array, Array]:
  """Return two arrays of independent standard normal numbers."""
  high, low, turn = words(key, 3, shape)
  radius = jnp.sqrt(2 * exponential(high, low, dtype))
  # An eighth of a turn, where both series end early and lose no digits near 0;
  # the three upper bits say which eighth.
  angle = (turn & (2**29 - 1)).astype(dtype) * (math.pi / 4 * 2.0**-29)
  square = angle * angle
  sine, cosine = angle * _series(square, 1), _series(square, 0)
  swapped = (turn >> 29) & 1 == 1
  one, other = (
    jnp.where(swapped, sine, cosine),
    jnp.where(swapped, cosine, sine),
  )
  sign = lambda bit: jnp.where((turn >> bit) & 1 == 1, -radius, radius)
  return sign(30) * one, sign(31) * other


def laplace(
  key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Array:
  """Return independent Laplace numbers of scale 1.

  Args:
    key: of these draws.
    shape: of the result.
    dtype: float32 or wider.
  """
  high, low, coin = words(key, 3, shape)
  magnitude = exponential(high, low, dtype)
  return jnp.where(coin >> 31 == 1, -magnitude, magnitude)


def words(key: Key, count: int, shape: tuple[int, ...]) -> list[Array]:
  """Return arrays of independent random words.

  A block of Threefry is two words, of which `jax.random.bits` makes one; the
  blocks are most of what noise costs.

  Args:
    key: of these draws.
    count: of the arrays.
    shape: of each.

  Returns:
    uint32.
  """
  threefry = str(jax.random.key_impl(key)) == "threefry2x32"
  if not threefry or math.prod(shape) > 2**32:  # a block's two numbers' end
    return list(jax.random.bits(key, (count, *shape), jnp.uint32))
  _ = jax.random.bits(key, ())  # for JAX's check of keys that are used twice
  blocks = (count + 1) // 2
  # Row by row of arrays that may be in pieces, which a flat count is not.
  index, stride = jnp.zeros((blocks, *shape), jnp.uint32), 1
  for axis in range(len(shape), 0, -1):
    along = lax.broadcasted_iota(jnp.uint32, index.shape, axis)
    index += along * jnp.uint32(stride % 2**32)
    stride *= shape[axis - 1]
  # From 1: `fold_in` makes keys of the blocks that begin with 0, as `split`
  # does unless jax_threefry_partitionable is off.
  which = lax.broadcasted_iota(jnp.uint32, index.shape, 0) + 1
  ones, others = threefry2x32_p.bind(*jax.random.key_data(key), which, index)
  pairs = zip(ones, others, strict=True)
  return list(itertools.chain.from_iterable(pairs))[:count]


def exponential(high: Array, low: Array, dtype: Any = jnp.float32) -> Array:
  """Return -log((bits + 1/2) / 2^64), with all digits that the dtype has.

  Args:
    high: uint32, the upper half of 64 random bits.
    low: uint32, the lower half.
    dtype: float32 or wider.

  Returns:
    From 2^-65 to 65 log 2.
  """
  upper = high >> 31 == 1  # then 1 - u is what can be told exactly
  high, low = (jnp.where(upper, ~x, x) for x in (high, low))
  u = high.astype(dtype) * 2.0**-32 + (low.astype(dtype) + 0.5) * 2.0**-64
  # One logarithm for both: log(1 - u) = log(w) u / (1 - w), of which w = 1 - u
  # is rounded and 1 - w is not (Goldberg 1991, "What every computer scientist
  # should know about floating-point arithmetic", theorem 4).
  w = jnp.where(upper, 1 - u, u)
  log, gap = jnp.log(w), 1 - w
  some = gap > 0
  near = jnp.where(some, log * (u / jnp.where(some, gap, 1)), -u)
  return -jnp.where(upper, near, log)


def _series(square: Array, first: int) -> Array:
  """Return cos x, or sin(x) / x if `first` is 1, for x^2 up to (pi / 4)^2."""
  terms = 6 if square.dtype == jnp.float32 else 11
  result = jnp.ones_like(square)
  for i in range(2 * terms + first, first, -2):
    result = 1 - square / (i * (i - 1)) * result
  return result


def gaussian_exposure(sensitivity: float, coordinates: int) -> float:
  """Return a bound of how often Gaussian noise's range exposes a client.

  A pair of coordinates that a client moves by a, in standard deviations, is
  beyond the `RADIUS`, which a neighbor's noise cannot pass, with the
  probability of the tail of a noncentral chi-squared law. That is convex in
  a^2 (each of the central laws of which it is a Poisson mixture adds more than
  the one before, far out in the tail), so a client is exposed most if it moves
  one pair alone.

  Args:
    sensitivity: how far one client can move all of the release, in L2 and in
      standard deviations of the noise.
    coordinates: of the release.

  Raises:
    ImportError: the extra `privacy` is missing.
  """
  if sensitivity >= 6:  # no noise to speak of; not convex for ever
    return 1.0
  law = library("scipy.stats").ncx2
  moved = float(law.sf(RADIUS**2, 2, sensitivity**2)) if sensitivity else BEYOND
  return min(1.0, moved + BEYOND * (coordinates - 1) / 2)


def laplace_exposure(sensitivity: float, coordinates: int) -> float:
  """Return a bound of how often Laplace noise's range exposes a client.

  A coordinate that a client moves by a_i scales exposes it with a probability
  of 2^-64 exp(a_i), which is convex.

  Args:
    sensitivity: how far one client can move all of the release, in L1 and in
      scales of the noise.
    coordinates: of the release.
  """
  if sensitivity >= MAGNITUDE:
    return 1.0
  return min(1.0, BEYOND * (coordinates - 1 + math.exp(sensitivity)))
