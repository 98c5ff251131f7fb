"""Discrete Gaussian noise and its accounting, against float64 and scipy."""

import bisect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal, stats

from fedjax_sim.privacy import draws
from fedjax_sim.privacy.secure import discrete_gaussian, distributed_gaussian
from fedjax_sim.privacy.secure.distributed_gaussian import Grid
from tiers import slow_but

DRAWS = 200_000


def pmf(stddev, most):
  x = np.arange(-most, most + 1)
  weights = np.exp(-(x**2) / (2 * stddev**2))
  return x, weights / weights.sum()


sample = jax.jit(discrete_gaussian.sample, static_argnums=(1, 2))


@pytest.mark.parametrize("stddev", [0.3, 1.0, 60.0, 1024.0, 1500.0, 2.0**19])
def test_draws_have_the_exact_law(stddev):
  drawn = np.asarray(sample(jax.random.key(1), stddev, (DRAWS,)))
  x, p = pmf(stddev, discrete_gaussian.reach(stddev))
  assert drawn.dtype == np.int32
  counts = np.bincount(drawn - x[0], minlength=len(x))
  assert counts.sum() == DRAWS
  # Bins of at least 20 expected draws each.
  bins = np.minimum((np.cumsum(p) * DRAWS // 20).astype(int), DRAWS // 20 - 1)
  found = np.bincount(bins, counts)
  expected = np.bincount(bins, p) * DRAWS
  full = expected > 0
  assert stats.chisquare(found[full], expected[full]).pvalue > 1e-4


@pytest.mark.parametrize("stddev", [0.05, 0.3, 3.0, 20.0, 1024.0])
def test_the_table_is_the_distribution_function(stddev):
  most = discrete_gaussian.reach(stddev)
  table = discrete_gaussian.thresholds(stddev)
  assert len(table) == most or stddev < 5  # where the last ones are 0
  assert list(table) == sorted(set(table))
  beyond = [entry / 2**95 for entry in table[::-1]]
  x, p = pmf(stddev, math.ceil(15 * stddev) + 3)
  exact = [p[np.abs(x) > m].sum() for m in range(len(table))]
  np.testing.assert_allclose(beyond, exact, rtol=1e-9, atol=4e-27)
  # What is beyond the table's end, in steps.
  assert p[np.abs(x) > most].sum() * 2.0**95 < 150


@pytest.mark.parametrize("stddev", [0.0, -1.0, 2.0**19 + 1])
def test_a_standard_deviation_without_a_table_is_refused(stddev):
  for ask in (discrete_gaussian.stages, discrete_gaussian.thresholds):
    with pytest.raises(ValueError, match=r"^stddev=.* is out of range"):
      ask(stddev)


@pytest.mark.parametrize("stddev", slow_but([0.3, 3.0], [0.3, 3.0, 1024.0]))
def test_bits_are_looked_up_in_all_of_their_96(stddev, monkeypatch):
  """The numbers below every threshold, the threshold's own, and the ends."""
  table = discrete_gaussian.thresholds(stddev)
  asked = [entry - 1 for entry in table] + [*table, 0, 2**94, 2**95 - 1]
  asked += [entry + 2**95 for entry in asked]  # and with the sign
  bits = np.array(
    [[entry >> 32 * i & (2**32 - 1) for entry in asked] for i in (2, 1, 0)],
    np.uint32,
  )
  monkeypatch.setattr(draws, "words", lambda *_: jnp.asarray(bits))
  draw = lambda key: discrete_gaussian.sample(key, stddev, (len(asked),))
  drawn = np.asarray(jax.jit(draw)(jax.random.key(0)))
  half = len(asked) // 2
  expected = [
    len(table) - bisect.bisect_right(table, entry) for entry in asked[:half]
  ]
  np.testing.assert_array_equal(drawn[:half], expected)
  np.testing.assert_array_equal(drawn[half:], np.negative(expected))


@pytest.mark.parametrize(("factor", "stddev"), [(1, 1.5), (2, 2.4), (3, 3.4)])
def test_two_draws_make_one_but_for_a_ripple(factor, stddev):
  """The exact law of k A + B, by convolution, where the ripple can be seen."""
  most = math.ceil(40 * stddev)
  _, one = pmf(stddev, most)
  spread = np.zeros(2 * factor * most + 1)
  spread[::factor] = one
  law = signal.convolve(spread, one, method="direct")
  both = stddev * math.hypot(factor, 1)
  x, exact = pmf(both, (factor + 1) * most)
  near = np.abs(x) < 6 * both
  ratio = law[near] / exact[near]
  bound = discrete_gaussian.ripple(stddev**2 / both)
  found = np.abs(ratio - 1).max()
  assert found <= 2 * bound + 1e-13  # the sum over all x ripples, too
  assert found > 0.4 * bound
  assert np.abs(law - exact).sum() / 2 <= bound + 1e-13


@pytest.mark.parametrize("stddev", [1024.5, 3000.0, 2.0**18, 2.0**19])
def test_two_draws_have_the_variance_of_one(stddev):
  factor, each = discrete_gaussian.stages(stddev)
  assert factor >= 1
  assert each <= discrete_gaussian.MOST_TABLE
  assert each**2 >= 2 * stddev * (1 - 1e-5)  # wide enough
  assert 1 <= each * math.hypot(factor, 1) / stddev < 1 + 1e-14
  # What 96 bits leave out is all that there is: the ripple is far less.
  assert discrete_gaussian.distance(stddev) < 3e-25
  assert discrete_gaussian.ripple(each**2 / stddev) < 1e-33


def test_a_grid_is_the_finest_that_fits():
  made = distributed_gaussian.grid(100, 1.0, 20)
  room = 2**19 - 1

  def largest(grid):
    return 100 * (grid.scale + discrete_gaussian.reach(grid.stddev))

  assert largest(made) <= room
  assert largest(made._replace(scale=2 * made.scale)) > room
  wide = distributed_gaussian.grid(100, 1.0)
  assert wide.stddev <= 1024 < 2 * wide.stddev


def test_a_grid_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r"bits=8 .* fits no grid"):
    distributed_gaussian.grid(200, 1.0, 8)


def test_rounding_by_chance_keeps_the_mean_and_the_bound():
  scale, dimension = 4.0, 64
  x = np.random.default_rng(0).normal(size=dimension)
  x = (scale * x / np.linalg.norm(x)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 4000)
  rounded = np.asarray(
    jax.vmap(
      lambda k: distributed_gaussian.round_by_chance(k, {"x": x}, scale)["x"]
    )(keys),
    np.float64,
  )
  assert np.all(rounded == np.round(rounded))
  assert np.max(np.abs(rounded - x)) < 1
  bound = distributed_gaussian.squared_sensitivity(scale, dimension)
  squared = (rounded**2).sum(1)
  assert squared.max() <= bound
  # Unconditional rounding exceeds it at times, so the condition is at work.
  noise = np.random.default_rng(1).random((4000, dimension))
  assert (np.floor(x + noise) ** 2).sum(1).max() > bound
  # Each rounding has a variance of at most 1/4; conditioning biases a little.
  np.testing.assert_allclose(rounded.mean(0), x, atol=0.1)


@pytest.mark.parametrize("mean", slow_but([True], [False, True]))
def test_the_sum_of_all_clients_is_the_sum_with_gaussian_noise(mean):
  clients, dimension, clip, multiplier = 20, 5000, 3.0, 0.7
  code = distributed_gaussian.distributed_gaussian(
    clients, clip=clip, noise_multiplier=multiplier, mean=mean
  )
  updates = np.random.default_rng(0).normal(size=(clients, dimension))
  updates *= 10 / np.linalg.norm(updates, axis=1, keepdims=True)
  hparams = {"clip": jnp.float32(clip)}
  keys = jax.random.split(jax.random.key(3), clients)

  @jax.jit
  def summed(updates, keys):
    encode = lambda u, k: code.encode(u, jnp.float32(1), k, hparams)
    return code.decode(jax.vmap(encode)(updates, keys).sum(0), hparams)

  total = np.asarray(summed(updates.astype(np.float32), keys))
  expected = (updates * clip / 10).sum(0)
  if mean:
    total = total * clients
  noise = (total - expected) / (clip * multiplier)
  assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_an_update_beyond_the_norm_is_scaled_down():
  code = distributed_gaussian.distributed_gaussian(
    1, clip=1.0, noise_multiplier=1e-3
  )
  hparams = {"clip": jnp.float32(1.0)}

  @jax.jit
  def back(update, key):
    message = code.encode(update, jnp.float32(1), key, hparams)
    return code.decode(message, hparams)

  found = back({"w": jnp.array([300.0, 400.0])}, jax.random.key(0))["w"]
  np.testing.assert_allclose(found, [0.6, 0.8], atol=0.01)


def renyi(alpha, p, shift):
  """The divergence of a law on whole numbers from its shift."""
  p = np.append(p, np.zeros(shift)), np.append(np.zeros(shift), p)
  both = (p[0] > 0) & (p[1] > 0)
  terms = alpha * np.log(p[0][both]) + (1 - alpha) * np.log(p[1][both])
  return np.log(np.exp(terms).sum()) / (alpha - 1)


@pytest.mark.parametrize("stddev", [0.5, 0.7, 1.5])
@pytest.mark.parametrize("clients", [2, 5, 12])
def test_the_bound_holds_for_the_exact_law_of_a_sum(stddev, clients):
  """What zcdp says bounds the Renyi divergence, by a convolution in float64."""
  _, one = pmf(stddev, math.ceil(12 * stddev))
  law = one
  for _ in range(clients - 1):
    law = signal.convolve(law, one, method="direct")
  shift = 2
  # A scale whose rounded length is the shift: (scale + 1)^2 is the least.
  made = Grid(clients, stddev * math.sqrt(clients), 1.0)
  assert made.stddev == pytest.approx(stddev)
  scaled = shift / math.sqrt(distributed_gaussian.squared_sensitivity(1.0, 1))
  rho = distributed_gaussian.zcdp(made, 1, least=clients, sensitivity=scaled)
  for alpha in (1.5, 2, 4):
    exact = renyi(alpha, law, shift)
    assert exact <= rho * alpha * (1 + 1e-9)
  # And where the grid is fine, it is the Gaussian's and not more.
  if stddev == 1.5:
    gaussian = shift**2 / (2 * clients * stddev**2)
    assert rho == pytest.approx(gaussian, rel=1e-3)


def test_the_accounting_is_the_papers_formula():
  """Theorem 1 of arXiv 2102.06387, term by term, in other words."""
  clip, gamma, local, n, d = 1.0, 1 / 8, 0.06, 30, 400
  beta = math.exp(-0.5)
  grown = min(
    clip**2
    + gamma**2 * d / 4
    + math.sqrt(2 * math.log(1 / beta))
    * gamma
    * (clip + gamma * math.sqrt(d) / 2),
    (clip + gamma * math.sqrt(d)) ** 2,
  )
  tau = 10 * sum(
    math.exp(-2 * math.pi**2 * local**2 / gamma**2 * k / (k + 1))
    for k in range(1, n)
  )
  expected = min(
    math.sqrt(grown / (n * local**2) + tau * d / 2),
    math.sqrt(grown) / (math.sqrt(n) * local) + tau * math.sqrt(d),
  )
  made = Grid(n, local * math.sqrt(n) / clip, clip / gamma)
  rho = distributed_gaussian.zcdp(made, d, least=n)
  assert rho == pytest.approx(expected**2 / 2, rel=1e-3)
  assert tau * d > 1e-3  # so that tau is tested, too


def test_fewer_survivors_and_replacement_cost_more():
  made = distributed_gaussian.grid(100, 2.0)
  all_ = distributed_gaussian.zcdp(made, 1000, least=100)
  assert all_ == pytest.approx(1 / (2 * 2.0**2), rel=0.01)
  half = distributed_gaussian.zcdp(made, 1000, least=50)
  assert half == pytest.approx(2 * all_)
  other = distributed_gaussian.zcdp(made, 1000, least=100, sensitivity=2)
  assert other == pytest.approx(4 * all_)
  with pytest.raises(ValueError, match=r"least=101 is out of range"):
    distributed_gaussian.zcdp(made, 1000, least=101)


def test_epsilon_is_at_most_the_simple_conversion():
  """Bun and Steinke 2016, proposition 1.3: rho + 2 sqrt(rho log(1 / delta))."""
  rho, delta, rounds = 0.01, 1e-5, 20
  simple = rho * rounds + 2 * math.sqrt(rho * rounds * math.log(1 / delta))
  found = distributed_gaussian.epsilon(rho, delta, rounds)
  assert 0.85 * simple < found < simple
