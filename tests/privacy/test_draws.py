"""Noise with tails: the generator's laws, and its ends by enumeration."""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax.extend.random import threefry2x32_p

from fedjax_sim.privacy import draws

exponential = jax.jit(draws.exponential, static_argnums=2)


def words(bits):
  """The halves of 64-bit numbers."""
  bits = np.asarray(bits, np.uint64)
  return (bits >> np.uint64(32)).astype(np.uint32), bits.astype(np.uint32)


def told(bits, dtype=jnp.float32):
  return np.asarray(exponential(*words(bits), dtype), np.float64)


@pytest.mark.parametrize("name", ["normal", "normal_apart", "laplace"])
def test_laws(name):
  law = scipy.stats.laplace if name == "laplace" else scipy.stats.norm
  draw = jax.jit(functools.partial(getattr(draws, name), shape=(501, 400)))
  x = np.asarray(draw(jax.random.key(1)), np.float64)
  assert x.shape == (501, 400)
  assert scipy.stats.kstest(x.ravel(), law.cdf).pvalue > 1e-3
  kurtosis = float(law.stats(moments="k"))
  for power, moment in ((1, 0.0), (2, law.var()), (4, kurtosis + 3)):
    sample = (x / law.std() ** (power == 4)) ** power
    error = sample.std() / np.sqrt(x.size)
    assert abs(sample.mean() - moment) < 4 * error
  # Halves that are drawn together, and neighbors, are independent.
  for a, b in ((x[:250], x[250:500]), (x[:, ::2], x[:, 1::2])):
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    assert abs(np.corrcoef(a.ravel() ** 2, b.ravel() ** 2)[0, 1]) < 0.02


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_words_are_bits_that_nothing_else_has(impl, count):
  """Also under vmap, and apart from the keys that are made of the same key."""
  keys = jax.random.split(jax.random.key(5, impl=impl), 2)
  draw = functools.partial(draws.words, count=count, shape=(40, 25))
  each = np.array([draw(key) for key in keys])
  if impl != "rbg":  # whose draws are others under vmap
    batched = np.stack(jax.vmap(draw)(keys), axis=1)
    np.testing.assert_array_equal(batched, each)
  assert each.shape == (2, count, 40, 25)
  assert each.dtype == np.uint32
  folded = jax.vmap(lambda i: jax.random.fold_in(keys[0], i))(np.arange(1000))
  split = jax.random.split(keys[0], 1000)
  made = np.array([jax.random.key_data(k)[:, :2] for k in (folded, split)])
  # Of so few numbers of 32 bits hardly any two are the same: one in 2,000.
  everything = np.concatenate([each.ravel(), made[0].ravel()])
  assert len(everything) - len(np.unique(everything)) <= 2
  assert len(np.intersect1d(each, made[1])) <= 1
  bits = np.unpackbits(each.view(np.uint8))
  assert abs(bits.mean() - 0.5) < 4 * 0.5 / np.sqrt(bits.size)


def test_words_are_those_of_blocks_that_are_counted_row_by_row():
  key, shape = jax.random.key(3), (5, 2, 3)
  found = draws.words(key, 4, shape)
  index = jnp.arange(30, dtype=jnp.uint32).reshape(shape)
  for block in (0, 1):
    pair = threefry2x32_p.bind(
      *jax.random.key_data(key), jnp.full_like(index, block + 1), index
    )
    np.testing.assert_array_equal(found[2 * block : 2 * block + 2], pair)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_words_of_few(shape):
  assert [w.shape for w in draws.words(jax.random.key(0), 3, shape)] == [
    shape
  ] * 3


def test_a_key_that_noise_was_drawn_with_is_used():
  """To JAX's own check of keys that are used twice."""
  draw = jax.jit(lambda key: draws.normal(key, (3,)))
  twice = jax.jit(lambda key: draws.laplace(key, (3,)) + draw(key))
  with jax.debug_key_reuse(True):
    draw(jax.random.key(1))
    with pytest.raises(jax.errors.KeyReuseError):
      twice(jax.random.key(1))


def test_all_digits_at_both_ends(x64):
  """-log of 64-bit numbers, with 50 digits."""
  small = [0, 1, 2, 1000, 2**20, 2**31, 2**33 + 5, 2**40, 2**62, 2**63 - 1]
  with decimal.localcontext() as context:
    context.prec = 50
    for bits in [*small, *(2**64 - 1 - b for b in small)]:
      exact = -((decimal.Decimal(bits) + decimal.Decimal("0.5")) / 2**64).ln()
      for dtype, digits in ((jnp.float32, 4e-7), (jnp.float64, 1e-14)):
        np.testing.assert_allclose(told(bits, dtype), float(exact), rtol=digits)


def test_it_reaches_9_49_deviations_and_45_scales():
  """The largest number that any bits give, and the smallest."""
  np.testing.assert_allclose(told(0), 65 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(told(2**64 - 1), 2.0**-65, rtol=1e-6)
  radius = np.sqrt(2 * told(0))
  assert radius > 9.48
  seen = jax.random.normal(jax.random.key(0), (2_000_000,))
  assert np.abs(seen).max() < 5.5 < draws.RADIUS


@pytest.mark.parametrize("least", [3.0, 5.42, 7.0, 9.0])
def test_tails_by_enumeration(least):
  """How many of the 2^64 numbers have a radius beyond one.

  The radius falls as the bits rise, so bisection finds the last one.
  """
  wanted = least**2 / 2
  low, high = 0, 2**63
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if told(middle) > wanted else (low, middle)
  chance = (low + 1) / 2.0**64
  # A bit more than float32's rounding, and half a step of the bits, can move.
  np.testing.assert_allclose(chance, np.exp(-wanted), rtol=3e-5 + 0.5 / low)


def test_a_coordinate_has_the_normal_tail():
  """P(|r cos t| > x), over radii by enumeration and all directions."""
  x = 7.0
  radii = np.sqrt(
    2 * told(np.unique(np.geomspace(1, 2**40, 20_000).astype(np.uint64)))
  )
  bits = np.unique(np.geomspace(1, 2**40, 20_000).astype(np.uint64))
  inside = np.clip(x / radii, 0, 1)
  share = 2 / np.pi * np.arccos(inside)
  chance = np.trapezoid(share, bits.astype(np.float64)) / 2.0**64
  np.testing.assert_allclose(chance, 2 * scipy.stats.norm.sf(x), rtol=0.01)


@pytest.mark.parametrize("moved", [0.3, 1.0, 2.0, 5.0])
def test_gaussian_exposure_is_a_bound(moved):
  """Of one pair: all of a Gaussian that lies beyond the radius; of many too."""

  def beyond(t):  # in direction t from the origin, integrated over all radii
    along = moved * np.cos(t)
    reach = draws.RADIUS - along
    across = np.exp(-((moved * np.sin(t)) ** 2) / 2) / (2 * np.pi)
    gauss = np.exp(-(reach**2) / 2)
    tail = along * np.sqrt(2 * np.pi) * scipy.stats.norm.sf(reach)
    return across * (gauss + tail)

  exact = scipy.integrate.quad(beyond, 0, 2 * np.pi, epsabs=0, epsrel=1e-10)[0]
  np.testing.assert_allclose(
    draws.gaussian_exposure(moved, 1), exact, rtol=1e-4
  )
  for pairs in (2, 5, 50, 400):
    law = scipy.stats.ncx2
    spread = pairs * law.sf(draws.RADIUS**2, 2, moved**2 / pairs)
    assert spread <= draws.gaussian_exposure(moved, 2 * pairs)


def test_laplace_exposure_is_the_chance_of_the_gap():
  for moved in (0.5, 4.0, 20.0):
    exact = np.exp(-(draws.MAGNITUDE - moved))
    assert exact <= draws.laplace_exposure(moved, 1) * (1 + 1e-9)
    assert draws.laplace_exposure(moved, 1) <= exact * (1 + 1e-9)
  assert draws.laplace_exposure(50.0, 3) == 1.0
