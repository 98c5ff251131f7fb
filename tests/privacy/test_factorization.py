"""Strategies: sensitivity by brute force, inverses, errors, determinism."""

import concurrent.futures
import functools
import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.privacy import library
from fedjax_sim.privacy.central import factorization
from fedjax_sim.privacy.central.factorization import Strategy, banded, blt
from tiers import slow_but

MADE = {
  "banded": lambda: banded(12, 4),
  "one band": lambda: banded(12, 1),
  "all bands": lambda: banded(12, 12),
  "blt": lambda: blt(12, 3),
}


@pytest.fixture(params=MADE)
def strategy(request):
  return MADE[request.param]()


def matrix(strategy, rounds=None):
  """C, or its first rows and columns, in float64."""
  first = strategy.coefficients[:rounds]
  return scipy.linalg.toeplitz(first, np.zeros(len(first)))


def patterns(rounds, period):
  """All sets of rounds that are `period` apart at least."""
  for bits in range(1 << rounds):
    chosen = [i for i in range(rounds) if bits >> i & 1]
    if all(b - a >= period for a, b in itertools.pairwise(chosen)):
      yield chosen


def rms_error(first, sensitivity):
  """Of running totals, for noise of multiplier 1: A C^-1 by scipy."""
  c = scipy.linalg.toeplitz(first, np.zeros(len(first)))
  totals = np.tri(len(first))
  b = scipy.linalg.solve_triangular(c.T, totals.T).T  # B C = A
  return sensitivity * np.sqrt(np.sum(b**2) / len(first))


# --- sensitivity --------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 5, 9])
@pytest.mark.parametrize("period", [1, 2, 4, 12])
def test_sensitivity_is_the_farthest_that_a_client_can_move(
  strategy, rounds, period
):
  """Over all patterns and signs; random vectors move less."""
  c = matrix(strategy, rounds)
  rng = np.random.default_rng(0)
  farthest = 0.0
  vectors = 0.0
  for chosen in patterns(rounds, period):
    columns = c[:, chosen]  # (rounds, chosen)
    signs = np.array(list(itertools.product([1, -1], repeat=len(chosen)))).T
    moved = np.linalg.norm(columns @ signs, axis=0)
    farthest = max(farthest, float(moved.max()))
    contributions = rng.normal(size=(len(chosen), 3))
    contributions /= np.linalg.norm(contributions, axis=1, keepdims=True)
    vectors = max(vectors, float(np.linalg.norm(columns @ contributions)))
  claimed = strategy.sensitivity(rounds, period)
  assert claimed == pytest.approx(farthest, rel=1e-12)
  assert vectors <= claimed * (1 + 1e-12)


@given(
  drops=st.lists(st.floats(0, 1), min_size=1, max_size=9),
  period=st.integers(1, 9),
)
def test_sensitivity_of_any_coefficients_that_fall(drops, period):
  coefficients = np.cumprod(np.array(drops))
  rounds = len(drops)
  strategy = Strategy(coefficients, None, None, rounds)
  c = matrix(strategy)
  farthest = max(
    np.linalg.norm(c[:, chosen].sum(1)) for chosen in patterns(rounds, period)
  )
  assert strategy.sensitivity(rounds, period) == pytest.approx(farthest)


@pytest.mark.parametrize("period", slow_but([100], [1, 7, 16, 64, 100]))
def test_sensitivity_agrees_with_jax_privacy(period):
  toeplitz = library("jax_privacy.matrix_factorization.toeplitz")
  for strategy in (banded(64, 16), blt(64, 16)):
    with jax.enable_x64(True):
      squared = toeplitz.minsep_sensitivity_squared(
        strategy.coefficients, period, n=64
      )
    ours = strategy.sensitivity(64, period)
    assert ours == pytest.approx(float(squared) ** 0.5, rel=1e-12)


def test_clients_apart_by_all_bands_move_orthogonally():
  strategy = banded(64, 16)
  assert strategy.bands == 16
  once = np.linalg.norm(strategy.coefficients)
  assert once == pytest.approx(1, rel=1e-6)
  cut = np.linalg.norm(strategy.coefficients[:10])
  assert strategy.sensitivity(16 + 16 + 10, 16) == pytest.approx(
    np.sqrt(2 * once**2 + cut**2), rel=1e-12
  )


def test_one_band_is_independent_noise():
  strategy = banded(12, 1)
  np.testing.assert_array_equal(strategy.coefficients, np.eye(12)[0])
  assert strategy.sensitivity(12, 5) == pytest.approx(np.sqrt(3), rel=1e-12)


@pytest.mark.parametrize(
  ("arguments", "error", "match"),
  [
    ((13, 1), ValueError, "rounds=13 .* from 1 to 12"),
    ((0, 1), ValueError, "rounds=0 .* from 1 to 12"),
    ((12, 0), ValueError, "period=0 .* >= 1"),
    ((12, 1.5), TypeError, r"period=1\.5 is a float"),
  ],
)
def test_sensitivity_refuses(arguments, error, match):
  with pytest.raises(error, match=match):
    banded(12, 4).sensitivity(*arguments)


# --- the matrices -------------------------------------------------------------


def test_the_stream_is_the_inverse(strategy):
  for each in (strategy, banded(64, 16), blt(64, 16)):
    n = each.rounds
    with jax.numpy_rank_promotion("allow"):
      inverse = np.asarray(each.noising.materialize(n))
    assert inverse.dtype == np.float32
    np.testing.assert_allclose(matrix(each) @ inverse, np.eye(n), atol=1e-6)


def test_a_run_of_one_round():
  for strategy in (banded(1, 1), blt(1, 1, 1)):
    np.testing.assert_array_equal(strategy.coefficients, [1.0])
    assert strategy.sensitivity(1, 1) == 1


def test_it_is_cached_and_read_only():
  assert banded(12, 4) is banded(12, 4)
  with pytest.raises(ValueError, match="read-only"):
    banded(12, 4).coefficients[0] = 2


# --- errors -------------------------------------------------------------------


def test_all_bands_are_optimal_for_one_participation():
  """Close to the lower-triangular optimum; published and by Cholesky.

  The square root's coefficients (arXiv 2202.11205) are optimal for the last
  total's error; those found have less mean error, by a few per cent at most.
  """
  rounds = 64
  k = np.arange(1, rounds)
  root = np.cumprod(np.append(1, (2 * k - 1) / (2 * k)))
  published = rms_error(root, np.linalg.norm(root))
  found = banded(rounds, rounds)
  ours = rms_error(found.coefficients, found.sensitivity(rounds, rounds))
  assert 0.95 * published < ours < published


@pytest.mark.slow
def test_three_buffers_are_nearly_optimal_for_one_participation():
  """As arXiv 2404.16706 says."""
  rounds = 200
  most = banded(rounds, rounds)
  few = blt(rounds, rounds, 3)
  ours = rms_error(few.coefficients, few.sensitivity(rounds, rounds))
  best = rms_error(most.coefficients, most.sensitivity(rounds, rounds))
  assert best < ours < 1.01 * best


def test_correlated_noise_is_less_at_the_same_epsilon():
  """Against independent noise, whose multiplier is the sensitivity's too."""
  rounds, period = 64, 16
  independent = banded(rounds, 1)
  plain = rms_error(
    independent.coefficients, independent.sensitivity(rounds, period)
  )
  # Independent noise: totals of 1 to n draws, each client n / period times.
  assert plain == pytest.approx(
    np.sqrt((rounds + 1) / 2 * rounds / period), rel=1e-12
  )
  errors = [
    rms_error(s.coefficients, s.sensitivity(rounds, period))
    for s in (banded(rounds, period), blt(rounds, period))
  ]
  assert max(errors) < 0.7 * plain
  assert max(errors) < 1.1 * min(errors)


def test_no_banded_strategy_nearby_is_better():
  """The optimum is one: any small step from it adds error."""
  rounds, bands = 40, 6
  found = banded(rounds, bands).coefficients
  best = rms_error(found, np.linalg.norm(found))
  rng = np.random.default_rng(0)
  for _ in range(50):
    step = np.zeros(rounds)
    step[:bands] = 0.02 * rng.normal(size=bands)
    near = found + step
    assert rms_error(near, np.linalg.norm(near)) > best * (1 - 1e-7)


# --- the same wherever it is made ---------------------------------------------


@pytest.mark.parametrize(
  "make",
  [
    functools.partial(banded, 12, 4),
    pytest.param(functools.partial(blt, 12, 3), marks=pytest.mark.slow),
  ],
)
def test_coefficients_do_not_depend_on_who_asks(make):
  """In a thread, in double precision, inside a trace: bit by bit the same."""
  once = make().coefficients

  def fresh():
    make.func.cache_clear()
    return make().coefficients

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    again = [pool.submit(fresh).result()]
  assert not jax.config.read("jax_enable_x64")
  with jax.enable_x64(True):
    again.append(fresh())

  @jax.jit
  def traced(x):
    again.append(fresh())
    return x

  traced(0.0)
  for other in again:
    np.testing.assert_array_equal(other, once)


@pytest.mark.slow
def test_another_process_finds_the_same():
  code = (
    "from fedjax_sim.privacy.central.factorization import banded, blt\n"
    "for strategy in (banded(12, 4), blt(12, 3)):\n"
    "  print(strategy.coefficients.tobytes().hex())"
  )
  told = subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True
  ).stdout.split()
  ours = [s.coefficients.tobytes().hex() for s in (banded(12, 4), blt(12, 3))]
  assert told == ours


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("make", "arguments", "error", "match"),
  [
    (banded, (0, 1), ValueError, r"server\.rounds=0"),
    (banded, (10, 11), ValueError, r"privacy\.bands=11 .* from 1 to 10"),
    (banded, (10, 2.0), TypeError, r"privacy\.bands=2.0 is a float"),
    (blt, (10, 0), ValueError, "period=0"),
    (blt, (10, 2, 0), ValueError, r"privacy\.buffers=0 .* from 1 to 10"),
    (blt, (10, 2, 11), ValueError, r"privacy\.buffers=11 .* from 1 to 10"),
  ],
)
def test_refuses(make, arguments, error, match):
  with pytest.raises(error, match=match):
    make(*arguments)


@pytest.mark.parametrize(
  "coefficients", [[1, -0.1], [1, 0.2, 0.3], [1, np.nan]]
)
def test_refuses_coefficients_that_the_sensitivity_is_wrong_for(coefficients):
  wrong = Strategy(np.array(coefficients), None, None, len(coefficients))
  with pytest.raises(ValueError, match="negative or increase"):
    factorization._checked(wrong)


def test_a_failed_search_says_what_to_do(monkeypatch):
  module = library("jax_privacy.matrix_factorization.buffered_toeplitz")

  def fail(*_, **__):
    raise RuntimeError("non-finite loss")

  monkeypatch.setattr(module, "optimize_loss", fail)
  with pytest.raises(ValueError, match=r"buffers=9: no strategy .* 14 rounds"):
    blt(14, 3, 9)
