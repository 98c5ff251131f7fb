"""Paired statistics, against scipy, simulations and values made by hand."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedjax_sim.studies import statistics
from fedjax_sim.studies.statistics import (
  bootstrap_interval,
  detectable,
  difference,
  holm,
  mean_interval,
  power,
  seeds_needed,
  welch_interval,
)

A = np.array([0.91, 0.88, 0.93, 0.90, 0.86])
B = np.array([0.89, 0.87, 0.90, 0.89, 0.85])


def finite(**bounds):
  return st.floats(allow_nan=False, width=32, **bounds)


pairs_of_samples = st.lists(
  st.tuples(
    finite(min_value=-8, max_value=8), finite(min_value=-8, max_value=8)
  ),
  min_size=2,
  max_size=12,
).map(
  lambda pairs: tuple(np.array(x, np.float64) for x in zip(*pairs, strict=True))
)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_paired_t_test_is_scipys(confidence):
  found = difference(A, B, confidence)
  test = stats.ttest_rel(A, B)
  interval = test.confidence_interval(confidence)
  assert found.seeds == 5
  np.testing.assert_allclose(found.mean, np.mean(A - B), rtol=1e-12)
  np.testing.assert_allclose(found.p_value, test.pvalue, rtol=1e-9)
  np.testing.assert_allclose(found.interval, interval, rtol=1e-9)
  np.testing.assert_allclose(
    found.correlation, np.corrcoef(A, B)[0, 1], rtol=1e-9
  )


def test_the_unpaired_interval_is_welchs():
  test = stats.ttest_ind(A, B, equal_var=False)
  wanted = test.confidence_interval(0.9)
  found = difference(A, B, 0.9)
  np.testing.assert_allclose(found.unpaired, wanted, rtol=1e-9)
  assert found.width_ratio == found.interval.width / found.unpaired.width
  uneven = welch_interval(A[:3], B)
  wanted = stats.ttest_ind(A[:3], B, equal_var=False).confidence_interval()
  np.testing.assert_allclose(uneven, wanted, rtol=1e-9)


def test_the_interval_of_a_mean_is_scipys():
  wanted = stats.ttest_1samp(A, 0).confidence_interval(0.9)
  np.testing.assert_allclose(mean_interval(A, 0.9), wanted, rtol=1e-9)


def test_the_bootstrap_is_near_the_normal_interval_of_many():
  x = np.random.default_rng(1).normal(3, 2, 400)
  half = 1.96 * x.std() / math.sqrt(len(x))
  low, high = bootstrap_interval(x)
  assert abs(low - (x.mean() - half)) < 0.05 * half
  assert abs(high - (x.mean() + half)) < 0.05 * half
  assert bootstrap_interval(x) == (low, high)


@given(pairs_of_samples)
def test_a_difference_is_antisymmetric(samples):
  a, b = samples
  one, other = difference(a, b), difference(b, a)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)
  assert one.mean == -other.mean
  for name in ("interval", "unpaired", "bootstrap"):
    interval, mirrored = getattr(one, name), getattr(other, name)
    near(interval, (-mirrored.high, -mirrored.low))
  near(one.p_value, other.p_value)
  assert one.seeds_needed == other.seeds_needed
  low, high = one.interval
  assert low <= one.mean <= high


def test_shared_luck_narrows_the_interval():
  """By the factor that the correlation predicts: sqrt(1 - rho)."""
  rng = np.random.default_rng(0)
  luck = rng.normal(0, 1, 800)
  a, b = (luck + rng.normal(0, 0.5, 800) for _ in range(2))
  found = difference(a, b)
  rho = 1 / (1 + 0.25)
  assert abs(found.correlation - rho) < 0.03
  assert abs(found.width_ratio - math.sqrt(1 - rho)) < 0.04


def test_one_seed_has_no_interval():
  found = difference([0.9], [0.8])
  assert found.mean == pytest.approx(0.1)
  unknown = [*found.interval, *found.bootstrap, *found.unpaired]
  assert np.isnan([*unknown, found.p_value, found.std, found.detectable]).all()
  assert found.seeds_needed is None


def test_equal_differences_have_no_test():
  """Also where they differ in the rounding of floats."""
  found = difference([0.3, 0.6, 0.9], [0.2, 0.5, 0.8])
  assert found.std == 0
  assert found.interval == (found.mean, found.mean)
  assert math.isnan(found.p_value)
  assert found.seeds_needed is None
  same = difference(A, A)
  assert same.bootstrap == (0, 0)
  assert math.isnan(same.width_ratio)
  assert math.isnan(same.p_value)


@pytest.mark.parametrize(
  ("a", "b", "said"),
  [
    ([], [], "give both a value for each"),
    ([1.0], [1.0, 2.0], "a has shape (1,), b (2,)"),
    ([1.0, math.nan], [1.0, 2.0], "not finite"),
  ],
)
def test_wrong_samples(a, b, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    difference(a, b)
  with pytest.raises(ValueError, match="confidence=1"):
    difference([1.0], [2.0], 1)


def test_holm_by_hand():
  """The example of Holm's procedure: 4 p1, 3 p2, 2 p3, p4, never falling."""
  found = holm([0.01, 0.04, 0.03, 0.005])
  np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])
  np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
  found = holm([0.02, math.nan, 0.01])
  np.testing.assert_allclose(found, [0.02, math.nan, 0.02])
  assert holm([]).shape == (0,)


@given(st.lists(finite(min_value=0, max_value=1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_bounds(p):
  p = np.array(p)
  found = holm(p)
  assert (found >= p).all()
  assert (found <= np.minimum(len(p) * p, 1) + 1e-12).all()
  order = np.argsort(p, kind="stable")
  assert (np.diff(found[order]) >= 0).all()
  np.testing.assert_allclose(holm(p[::-1]), found[::-1])


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 5), (0.5, 20), (2.0, 3)])
def test_power_is_how_often_a_difference_is_found(effect, seeds):
  x = np.random.default_rng(seeds).normal(effect, 1, (20_000, seeds))
  share = np.mean(stats.ttest_1samp(x, 0, axis=1).pvalue < 0.05)
  assert abs(power(effect, 1.0, seeds) - share) < 0.01


def test_power_of_two_samples():
  """Where the spread is that of a difference between unrelated runs."""
  a, b = np.random.default_rng(0).normal(0, 1, (2, 20_000, 8))
  share = np.mean(stats.ttest_ind(a + 1.2, b, axis=1).pvalue < 0.05)
  assert abs(power(1.2, math.sqrt(2), 8, samples=2) - share) < 0.01


def test_seeds_needed_are_the_first_that_suffice():
  """Cohen's table: an effect of 0.5 needs 34 pairs, or 64 of each sample."""
  assert seeds_needed(0.5, 1.0) == 34
  assert seeds_needed(-0.5, 1.0) == 34
  assert seeds_needed(0.5, math.sqrt(2), samples=2) == 64
  assert seeds_needed(100.0, 1.0) == 2
  assert seeds_needed(1e-4, 1.0) is None
  assert seeds_needed(0.0, 1.0) is None
  assert seeds_needed(1.0, math.nan) is None
  assert seeds_needed(1.0, 0.0) is None


@given(finite(min_value=0.03125, max_value=50))
def test_the_seed_before_does_not_suffice(effect):
  seeds = seeds_needed(effect, 1.0)
  assert seeds is not None
  assert power(effect, 1.0, seeds) >= statistics.POWER
  assert seeds == 2 or power(effect, 1.0, seeds - 1) < statistics.POWER


def test_what_is_detectable_needs_the_seeds_at_hand():
  for seeds in (2, 3, 5, 30):
    effect = detectable(0.25, seeds)
    assert power(effect, 0.25, seeds) == pytest.approx(0.8, abs=1e-6)
  assert math.isnan(detectable(0.25, 1))
  assert detectable(0.0, 3) == 0


@pytest.mark.slow
def test_coverage_of_the_intervals():
  """That docs/compare.md tells: of t as promised, of BCa too low."""
  rng = np.random.default_rng(0)
  for seeds, low, high in ((3, 0.66, 0.76), (5, 0.82, 0.89), (20, 0.90, 0.95)):
    x = rng.normal(0, 1, (1000, seeds))
    t = [mean_interval(row) for row in x]
    assert abs(np.mean([a <= 0 <= b for a, b in t]) - 0.95) < 0.02
    bca = [bootstrap_interval(row, resamples=999) for row in x]
    assert low < np.mean([a <= 0 <= b for a, b in bca]) < high
