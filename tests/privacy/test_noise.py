"""Noise: its laws by scipy, over coordinates, leaves, rounds and seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from fedjax_sim.core import Purpose, key_for
from fedjax_sim.privacy.central import noise
from fedjax_sim.privacy.central.factorization import banded, blt

STRATEGIES = {
  "independent": lambda: None,
  "banded": lambda: banded(12, 4),
  "blt": lambda: blt(12, 3),
}
TREE = {"a": jnp.full((2, 3), 5.0), "b": (jnp.zeros(()), jnp.ones((4,)))}


@pytest.fixture(params=STRATEGIES)
def strategy(request):
  return STRATEGIES[request.param]()


def key_of(round_, seed=0):
  return key_for(seed, Purpose.SERVER, round_)


def noised(strategy, *arguments):
  """`noise.noised`, compiled at once."""
  return jax.jit(functools.partial(noise.noised, strategy))(*arguments)


def stream(strategy, stddev, rounds, total, seed=0):
  """The noise of every round, leaves (rounds, ...)."""

  def step(state, round_):
    noisy, state = noise.noised(
      strategy, stddev, key_of(round_, seed), state, total
    )
    return state, jax.tree.map(jnp.subtract, noisy, total)

  @jax.jit
  def run(total):
    state = noise.init(strategy, total)
    return jax.lax.scan(step, state, jnp.arange(rounds))[1]

  return run(total)


laplace = jax.jit(noise.laplace)


def normal(x, stddev=1.0):
  return scipy.stats.kstest(np.ravel(x), scipy.stats.norm(0, stddev).cdf).pvalue


# --- Gaussian -----------------------------------------------------------------


def test_rounds_covary_as_the_strategy_says(strategy):
  """C^-1 C^-T, each entry within 5 standard errors."""
  rounds, coordinates, stddev = 12, 20_000, 1.5
  first = np.eye(rounds)[0] if strategy is None else strategy.coefficients
  c = scipy.linalg.toeplitz(first, np.zeros(rounds))
  inverse = np.linalg.inv(c)
  law = stddev**2 * inverse @ inverse.T
  total = jnp.zeros(coordinates)
  drawn = np.asarray(stream(strategy, stddev, rounds, total), np.float64)
  errors = np.sqrt(law**2 + np.outer(law.diagonal(), law.diagonal()))
  observed = drawn @ drawn.T / coordinates
  assert np.all(abs(observed - law) < 5 * errors / np.sqrt(coordinates))
  means = drawn.mean(1) / np.sqrt(law.diagonal() / coordinates)
  assert np.all(abs(means) < 5)
  # C turns it back into independent noise.
  assert normal(c @ drawn, stddev) > 0.001


def test_every_leaf_has_noise_of_its_own(strategy):
  """A round's first draw, over many seeds: independent coordinates."""
  seeds = 3000
  drawn = jax.vmap(lambda seed: stream(strategy, 1.0, 1, TREE, seed))(
    jnp.arange(seeds)
  )
  flat = np.concatenate(
    [np.reshape(leaf, (seeds, -1)) for leaf in jax.tree.leaves(drawn)], 1
  )
  assert flat.shape == (seeds, 11)
  scale = 1.0 if strategy is None else 1 / strategy.coefficients[0]
  for coordinate in flat.T:
    assert normal(coordinate, scale) > 0.001
  observed = np.corrcoef(flat.T) - np.eye(11)
  assert abs(observed).max() < 5 / np.sqrt(seeds)


def test_runs_that_are_vmapped_differ_and_are_those_alone(strategy):
  together = jax.vmap(lambda seed: stream(strategy, 1.0, 3, TREE, seed))(
    jnp.array([3, 4])
  )
  for i, seed in enumerate([3, 4]):
    alone = stream(strategy, 1.0, 3, TREE, seed)
    for one, other in zip(
      jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
    ):
      np.testing.assert_allclose(one[i], other, rtol=1e-5, atol=1e-5)
  assert all(
    not np.isin(leaf[0], leaf[1]).any() for leaf in jax.tree.leaves(together)
  )


def test_the_sum_stays_without_noise(strategy):
  state = noise.init(strategy, TREE)
  noisy, _ = noised(strategy, 0.0, key_of(0), state, TREE)
  jax.tree.map(np.testing.assert_array_equal, noisy, TREE)


def test_a_round_is_a_function_of_its_key_and_state(strategy):
  """What came before but the state, it does not know: a run can go on."""
  state = noise.init(strategy, TREE)
  call = functools.partial(noised, strategy, 1.0)
  one, after = call(key_of(1), state, TREE)
  again, _ = call(key_of(1), state, TREE)
  jax.tree.map(np.testing.assert_array_equal, one, again)
  other, _ = call(key_of(2), after, TREE)
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert not np.isin(x, y).any()


def test_another_standard_deviation_compiles_nothing(strategy):
  traces = []

  @jax.jit
  def step(stddev, key, state, total):
    traces.append(stddev)
    return noise.noised(strategy, stddev, key, state, total)

  state = noise.init(strategy, TREE)
  one, _ = step(jnp.float32(1), key_of(0), state, TREE)
  three, _ = step(jnp.float32(3), key_of(0), state, TREE)
  assert len(traces) == 1
  for x, y, total in zip(
    jax.tree.leaves(one),
    jax.tree.leaves(three),
    jax.tree.leaves(TREE),
    strict=True,
  ):
    np.testing.assert_allclose(3 * (x - total), y - total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_state_is_a_few_copies_in_float32(at_once, monkeypatch):
  if not at_once:
    monkeypatch.setattr(noise, "MOST_AT_ONCE", 6)
  tree = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(())}
  assert noise.init(None, tree) == ()
  for strategy, copies in ((banded(12, 4), 3), (blt(12, 3), 2)):
    leaves = jax.tree.leaves(noise.init(strategy, tree))
    shapes = [leaf.shape for leaf in leaves]
    each = [(copies, 2, 3), (copies,)]
    assert shapes == ([(copies, 7)] if at_once else each)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "banded"])
def test_large_arrays_have_noise_of_their_own(kind, monkeypatch):
  monkeypatch.setattr(noise, "MOST_AT_ONCE", 0)
  total = {"a": jnp.full((40, 50), 3.0), "b": jnp.zeros(2000)}
  if kind == "laplace":
    found = jax.jit(lambda *x: noise.laplace(*x))(2.0, key_of(0), total)
    law = scipy.stats.laplace(scale=2.0)
  else:
    strategy = banded(6, 3) if kind == "banded" else None
    state = noise.init(strategy, total)
    found, _ = noised(strategy, 2.0, key_of(0), state, total)
    first = 1.0 if strategy is None else strategy.coefficients[0]
    law = scipy.stats.norm(scale=2.0 / first)
  one, other = np.ravel(found["a"]) - 3, np.ravel(found["b"])
  for drawn in (one, other):
    assert scipy.stats.kstest(drawn, law.cdf).pvalue > 1e-3
  assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_products_are_exact_on_any_device(strategy):
  """A GPU's TF32 would make the noise another one than was accounted for."""
  state = noise.init(strategy, TREE)
  with jax.default_matmul_precision("bfloat16"):
    program = jax.make_jaxpr(functools.partial(noise.noised, strategy, 1.0))(
      key_of(0), state, TREE
    )
  products = [e for e in program.eqns if e.primitive.name == "dot_general"]
  assert bool(products) == (strategy is not None)
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert all(e.params["precision"] == highest for e in products)


# --- Laplace ------------------------------------------------------------------


def test_laplace_follows_its_law():
  scale, count = 0.7, 40_000
  total = {"a": jnp.full((count,), 2.0), "b": jnp.zeros((count // 2, 2))}
  noisy = jax.device_get(laplace(jnp.float32(scale), key_of(0), total))
  drawn = {name: np.ravel(noisy[name]) - 2 * (name == "a") for name in total}
  law = scipy.stats.laplace(0, scale)
  for leaf in drawn.values():
    assert scipy.stats.kstest(leaf, law.cdf).pvalue > 0.001
    assert abs(leaf.mean()) < 5 * law.std() / np.sqrt(count)
    # The fourth moment of Laplace's is 24 scale^4.
    error = np.sqrt(24 * scale**4 - law.var() ** 2) / np.sqrt(count)
    assert abs(leaf.var() - law.var()) < 5 * error
  correlation = np.corrcoef(drawn["a"], drawn["b"])[0, 1]
  assert abs(correlation) < 5 / np.sqrt(count)


def test_laplace_over_seeds_and_rounds():
  @jax.jit
  def draw(seed, round_):
    return noise.laplace(1.0, key_of(round_, seed), TREE)["a"]

  drawn = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(
    jnp.arange(2), jnp.arange(2)
  )
  assert len(np.unique(drawn)) == drawn.size
  np.testing.assert_allclose(drawn[1, 1], draw(1, 1), rtol=1e-6)


# --- dtypes -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_noisy_sum_is_in_float32(strategy, dtype):
  total = jnp.zeros(5000, dtype)
  noisy, _ = noised(
    strategy, 1.0, key_of(0), noise.init(strategy, total), total
  )
  assert noisy.dtype == jnp.float32
  assert len(np.unique(noisy)) > 4900  # bfloat16 has but few numbers
  drawn = jax.eval_shape(noise.laplace, 1.0, key_of(0), total)
  assert drawn.dtype == jnp.float32


def test_in_double_precision_the_sum_keeps_it(strategy, x64):
  total = jnp.full((3,), 1 + 2**-40, jnp.float64)
  state = noise.init(strategy, total)
  noisy, after = noised(strategy, 0.0, key_of(0), state, total)
  assert noisy.dtype == jnp.float64
  np.testing.assert_array_equal(noisy, total)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  drawn = jax.eval_shape(noise.laplace, 1.0, key_of(0), total)
  assert drawn.dtype == jnp.float64
