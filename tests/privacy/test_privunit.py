"""PrivUnit and ScalarDP: the paper's formulas, and scipy's distributions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from fedjax_sim.privacy.local import privunit, scalar_dp
from tiers import slow_but

KEY = jax.random.key(7)
DIMENSIONS = [2, 3, 5, 20, 1000, 10**6]
EPSILONS = [0.05, 1.0, 8.0, 60.0]


def uniform_below(t, d):
  """How likely an inner product below t >= 0 is, of uniform points."""
  return 1 - scipy.special.betaincc(0.5, (d - 1) / 2, np.square(t)) / 2


def of_paper(law, d):
  """Its gamma; how likely the cap is; how likely without any leaning."""
  gamma = math.sin(law.edge)
  area = scipy.special.betaincc(0.5, (d - 1) / 2, gamma**2) / 2
  return gamma, law.forget * area + 1 - law.forget, area


# --- the cap ------------------------------------------------------------------


CASES = [(d, e) for d in DIMENSIONS for e in EPSILONS if d >= 20 or e <= 8]


@pytest.mark.parametrize(("d", "epsilon"), CASES)
def test_the_paper_s_ratio_and_mean(d, epsilon):
  law = privunit.cap(d, epsilon)
  gamma, p, area = of_paper(law, d)
  # Densities on the cap and beside it, with the sphere as the unit of area;
  # their ratio is that of any two inputs at any output, at most.
  assert math.exp(law.area) == pytest.approx(area, rel=1e-6)
  on, off = p / area, law.forget
  assert math.log(on / off) == pytest.approx(epsilon, rel=1e-6)
  assert 0.5 <= p <= 1
  # m, with (1 - p) / B(tau) = forget / B(alpha, alpha).
  alpha = (d - 1) / 2
  log_front = alpha * math.log1p(-(gamma**2)) - (d - 2) * math.log(2)
  log_front -= math.log(d - 1) + scipy.special.betaln(alpha, alpha)
  mean = math.exp(log_front) * (on - off)
  assert law.mean == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_area_and_mean_by_brute_force(d):
  law = privunit.cap(d, 2.0)
  density = lambda x: math.cos(x) ** (d - 2)
  integral = lambda f, a: scipy.integrate.quad(f, a, math.pi / 2)[0]
  whole = 2 * integral(density, 0)
  inside = integral(density, law.edge) / whole
  assert math.exp(law.area) == pytest.approx(inside, rel=1e-9)
  towards = integral(lambda x: math.sin(x) * density(x), law.edge) / whole
  kept = (1 - law.forget) * towards / inside
  assert law.mean == pytest.approx(kept, rel=1e-9)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_no_other_cap_is_of_more_use(d):
  epsilon = 4.0
  best = privunit.cap(d, epsilon).mean
  alpha = (d - 1) / 2
  whole = scipy.special.betaln(0.5, alpha)

  def mean(gamma):
    area = scipy.special.betaincc(0.5, alpha, gamma**2) / 2
    forget = 1 / (1 + math.expm1(epsilon) * area)
    towards = math.exp(alpha * math.log1p(-(gamma**2)) - whole) / (d - 1)
    return (1 - forget) * towards / area

  gammas = np.minimum(np.linspace(0, 6, 200) / math.sqrt(d), 0.999)
  others = [mean(gamma) for gamma in gammas]
  assert best >= max(others) * (1 - 1e-9)
  assert best <= max(others) * 1.01


@pytest.mark.parametrize(("d", "epsilon"), [*CASES, (1000, 500.0)])
def test_what_is_drawn_has_the_density_of_the_cap(d, epsilon):
  """Of the interpolated latitudes, so that epsilon is that of the program."""
  law = privunit.cap(d, epsilon)
  exponents = np.linspace(0, 16, 2000)
  with jax.enable_x64(True):
    draw = lambda e: privunit._latitude(law, e)
    x, slope = jax.vmap(jax.value_and_grad(draw))(jnp.asarray(exponents))
  x, slope = np.asarray(x), np.asarray(slope)
  assert (slope > 0).all()
  drawn = -exponents - np.log(slope)
  fall = np.log(np.cos(law.edge + x)) - np.log(np.cos(law.edge))
  total = privunit._mills(law.edge, d - 2)
  np.testing.assert_allclose(drawn, (d - 2) * fall - math.log(total), atol=1e-4)


@pytest.mark.parametrize(
  ("epsilon", "d", "draws"),
  slow_but(
    [(0.5, 2, 20_000), (6.0, 3, 20_000), (0.5, 30, 20_000)],
    [
      (epsilon, d, draws)
      for epsilon in (0.5, 6.0)
      for d, draws in [(2, 20_000), (3, 20_000), (30, 20_000), (20_000, 1000)]
    ],
  ),
)
def test_points_against_scipy(d, draws, epsilon):
  law = privunit.cap(d, epsilon)
  direction = np.random.default_rng(0).normal(size=d)
  direction = (direction / np.linalg.norm(direction)).astype(np.float32)
  keys = jax.random.split(jax.random.fold_in(KEY, d), draws)
  sent = jax.jit(
    lambda keys: jax.lax.map(
      lambda key: privunit.point(direction, law, key), keys, batch_size=100
    )
  )(keys)
  points = np.asarray(sent, np.float64) * law.mean
  np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-5)

  gamma, p, area = of_paper(law, d)

  def below(t):
    t = np.clip(t, -1, 1)
    rest = np.where(
      t >= 0, uniform_below(np.abs(t), d), 1 - uniform_below(np.abs(t), d)
    )
    cap = np.maximum(rest - (1 - area), 0) / area
    return law.forget * rest + (1 - law.forget) * cap

  inner = points @ direction.astype(np.float64)
  assert scipy.stats.kstest(inner, below).pvalue > 1e-3
  assert scipy.stats.binomtest(int(sum(inner >= gamma)), draws, p).pvalue > 1e-3
  # Nothing but the direction is special, and the expectation is it.
  mean = points.mean(axis=0) / law.mean
  spread = points.std(axis=0).max() / law.mean / math.sqrt(draws)
  assert np.abs(mean - direction).max() < 5.5 * spread
  if d == 3:
    one = np.linalg.svd(direction[None].astype(np.float64))[2][1:]
    turn = np.arctan2(*(points @ one.T).T) / (2 * math.pi) % 1
    assert scipy.stats.kstest(turn, "uniform").pvalue > 1e-3


def test_a_sphere_of_one_dimension_is_refused():
  with pytest.raises(ValueError, match="two numbers at least, .* has 1"):
    privunit.cap(1, 1.0)


# --- the length ---------------------------------------------------------------


def told(law, number):
  """What a number is told as, and how likely each, in float64."""
  levels = np.arange(law.top + 1)
  low = min(int(law.top * number), law.top - 1)
  chance = np.zeros(law.top + 1)
  chance[low + 1] = law.top * number - low
  chance[low] = 1 - chance[low + 1]
  chance = (1 - law.forget) * chance + law.forget / (law.top + 1)
  return law.scale * (levels - law.centre), chance


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 4.0, 12.0])
def test_scalar_is_private_and_unbiased(epsilon):
  law = scalar_dp.levels(epsilon)
  numbers = np.linspace(0, 1, 2 * law.top + 1)[:1001]
  chances = []
  for number in [*numbers, 0.123, 1.0]:
    values, chance = told(law, number)
    np.testing.assert_allclose(chance.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(values @ chance, number, atol=1e-7 * law.scale)
    chances.append(chance)
  ratio = np.log(np.max(chances, axis=0) / np.min(chances, axis=0))
  assert ratio.max() == pytest.approx(epsilon, rel=1e-6)
  # The paper's own words for the same.
  e = math.exp(epsilon)
  assert law.scale == pytest.approx((e + law.top) / (e - 1) / law.top)
  assert law.centre == pytest.approx(
    law.top * (law.top + 1) / 2 / (e + law.top)
  )


@pytest.mark.parametrize("number", [0.0, 0.37, 1.0])
def test_scalar_draws(number):
  law, draws = scalar_dp.levels(3.5), 20_000
  draw = lambda key: scalar_dp.randomize(jnp.float32(number), law, key)
  sent = jax.jit(jax.vmap(draw))(jax.random.split(KEY, draws))
  values, chance = told(law, number)
  gaps = np.abs(np.asarray(sent)[:, None] - values[None])
  np.testing.assert_allclose(gaps.min(axis=1), 0, atol=1e-5)
  seen = np.bincount(gaps.argmin(axis=1), minlength=len(values))
  assert scipy.stats.chisquare(seen, chance * draws).pvalue > 1e-3


@pytest.mark.parametrize("epsilon", [5e3, 1e4])
def test_very_large_epsilons_say_the_truth(epsilon):
  law = scalar_dp.levels(epsilon)
  near = privunit.cap(100, epsilon)
  direction = jnp.eye(100)[3]

  @jax.jit
  def sent(number):
    point = privunit.point(direction, near, KEY)
    return scalar_dp.randomize(number, law, KEY), point

  number, point = sent(0.3)
  assert float(number) == pytest.approx(0.3, abs=2 / law.top)
  assert near.mean == pytest.approx(1, abs=1e-6)
  np.testing.assert_allclose(point, direction, atol=5e-3)


# --- both ---------------------------------------------------------------------


def test_an_update_is_the_mean_of_what_is_sent():
  randomizer, draws = privunit.privunit(2.0, epsilon=10.0), 10_000
  hparams = jax.tree.map(jnp.float32, randomizer.hparams)
  unit = {"b": np.array([0.6, 0.0]), "w": np.array([[0.0, -0.8, 0.0]])}
  apply = jax.jit(
    jax.vmap(randomizer.apply, in_axes=(None, None, None, 0)),
  )
  for length in (0.0, 0.4, 7.0):
    update = {name: jnp.float32(length * leaf) for name, leaf in unit.items()}
    keys = jax.random.split(KEY, draws)
    sent, weight = apply(update, jnp.float32(5), hparams, keys)
    np.testing.assert_array_equal(weight, 1)
    for name, leaf in unit.items():
      values = np.asarray(sent[name], np.float64)
      error = values.std(axis=0) / math.sqrt(draws)
      gap = values.mean(axis=0) - min(length, 2) * leaf
      assert np.all(np.abs(gap) < 5 * error)
