"""Paired statistics of two settings, over the seeds that both have.

Runs with one seed share cohorts, batches, initial parameters and noise, so
much of what a seed does to one setting it does to the other, too. The
difference within a seed is free of that, and its mean has a narrower interval
than two independent means have.

In float64, by numpy and scipy; nothing here knows of runs, files or JAX.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from fedjax_sim.core import validate

POWER = 0.8  # with which a difference shall be found
ALPHA = 0.05
MOST_SEEDS = 100_000
_EQUAL = 1e-12  # of the values: what is closer differs by rounding alone


class Interval(NamedTuple):
  """A confidence interval; both ends are NaN where there can be none."""

  low: float
  high: float

  @property
  def width(self) -> float:
    """How long it is."""
    return self.high - self.low


NO_INTERVAL = Interval(math.nan, math.nan)


class Difference(NamedTuple):
  """What sets two settings apart, a minus b, over n seeds.

  Attributes:
    seeds: n, the seeds that both have.
    mean: of the differences.
    std: their sample standard deviation; NaN for one seed.
    interval: of the mean, by the paired t test.
    bootstrap: of the mean, by BCa over the differences.
    unpaired: of the difference of means as if seeds were not shared, by
      Welch's t test.
    p_value: two-sided, of the paired t test; NaN where no spread is known.
    correlation: of a and b over the seeds; NaN without spread.
    seeds_needed: see `seeds_needed`, paired; None: beyond `MOST_SEEDS`, or
      unknown.
    seeds_needed_unpaired: the same for runs that share no seeds.
    detectable: see `detectable`.
  """

  seeds: int
  mean: float
  std: float
  interval: Interval
  bootstrap: Interval
  unpaired: Interval
  p_value: float
  correlation: float
  seeds_needed: int | None
  seeds_needed_unpaired: int | None
  detectable: float

  @property
  def width_ratio(self) -> float:
    """Width of the paired interval over that of the unpaired one.

    NaN where a difference is the same in every seed, as there is no interval.
    """
    if not (self.std > 0 and self.unpaired.width > 0):
      return math.nan
    return self.interval.width / self.unpaired.width


def difference(
  a: Sequence[float] | np.ndarray,
  b: Sequence[float] | np.ndarray,
  confidence: float = 0.95,
) -> Difference:
  """Compare two settings, of which the same seeds are known.

  Differences that are all equal have no spread to judge by: their interval is
  a point, and there is no p-value.

  Args:
    a: shape=(n,), finite, float; a value for each seed, n >= 1.
    b: shape=(n,); of the same seeds in the same order.
    confidence: of the intervals, > 0 and < 1.

  Raises:
    ValueError: shapes differ, there is no seed, a value is not finite, or
      `confidence` is out of range.

  Example:
    difference([0.9, 0.8, 0.85], [0.88, 0.79, 0.82]).interval
  """
  validate.number("confidence", confidence, gt=0, lt=1)
  x, y = (np.asarray(v, np.float64) for v in (a, b))
  if x.shape != y.shape or x.ndim != 1 or not x.size:
    raise ValueError(
      f"a has shape {x.shape}, b {y.shape}; give both a value for each of the"
      " same seeds."
    )
  if not (np.isfinite(x).all() and np.isfinite(y).all()):
    raise ValueError("a or b has values that are not finite; leave them out.")
  d = x - y
  scale = max(float(np.abs(x).max()), float(np.abs(y).max()))
  mean, std = float(d.mean()), spread(d, scale)
  width = _half_width(std, d.size, confidence)
  spreads = spread(x), spread(y)
  apart = math.hypot(*spreads)  # of a difference between unrelated seeds
  known = d.size > 1
  return Difference(
    seeds=d.size,
    mean=mean,
    std=std,
    interval=Interval(mean - width, mean + width),
    bootstrap=bootstrap_interval(d, confidence) if std > 0 else _point(d),
    unpaired=welch_interval(x, y, confidence),
    p_value=_p_value(mean, std, d.size),
    correlation=_correlation(spreads, std) if known else math.nan,
    seeds_needed=seeds_needed(mean, std),
    seeds_needed_unpaired=seeds_needed(mean, apart, samples=2),
    detectable=detectable(std, d.size),
  )


def spread(values: np.ndarray, scale: float | None = None) -> float:
  """Return the sample standard deviation; NaN of less than two values.

  It is 0 where values differ by the rounding of floats alone.

  Args:
    values: shape=(n,), finite.
    scale: of the numbers that they were made of; None: their own.
  """
  if len(values) < 2:
    return math.nan
  if scale is None:
    scale = float(np.abs(values).max())
  std = float(np.std(values, ddof=1))
  return 0.0 if std <= _EQUAL * scale else std


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
  """Return the t interval of a mean; NaN of less than two values.

  Args:
    values: shape=(n,), finite.
    confidence: > 0 and < 1.
  """
  if len(values) < 2:
    return NO_INTERVAL
  half = _half_width(spread(values), len(values), confidence)
  middle = float(np.mean(values))
  return Interval(middle - half, middle + half)


def welch_interval(
  a: np.ndarray, b: np.ndarray, confidence: float = 0.95
) -> Interval:
  """Return the interval of mean(a) - mean(b) of unrelated samples, by Welch.

  Args:
    a: shape=(n,), finite.
    b: shape=(m,), finite.
    confidence: > 0 and < 1.

  Returns:
    NaN if a sample has less than two values.
  """
  if min(len(a), len(b)) < 2:
    return NO_INTERVAL
  shares = [spread(v) ** 2 / len(v) for v in (a, b)]
  total = sum(shares)
  middle = float(np.mean(a) - np.mean(b))
  if total == 0:
    return Interval(middle, middle)
  parts = zip(shares, (len(a), len(b)), strict=True)
  freedom = total**2 / sum(s**2 / (n - 1) for s, n in parts)
  quantile = float(stats.t.ppf((1 + confidence) / 2, freedom))
  half = quantile * math.sqrt(total)
  return Interval(middle - half, middle + half)


def bootstrap_interval(
  values: np.ndarray, confidence: float = 0.95, resamples: int = 9999
) -> Interval:
  """Return the interval of a mean by the bootstrap, always the same.

  Efron 1987, "Better bootstrap confidence intervals" (BCa), as scipy has it.
  Of few values it is too narrow: see docs/compare.md.

  Args:
    values: shape=(n,), finite.
    confidence: > 0 and < 1.
    resamples: how many samples are drawn.

  Returns:
    NaN of less than two values.
  """
  if len(values) < 2:
    return NO_INTERVAL
  if spread(values) == 0:
    return _point(values)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", stats.DegenerateDataWarning)
    found = stats.bootstrap(
      (np.asarray(values, np.float64),),
      np.mean,
      confidence_level=confidence,
      n_resamples=resamples,
      method="BCa",
      rng=np.random.default_rng(0),
    ).confidence_interval
  return Interval(float(found.low), float(found.high))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
  """Correct p-values for how many there are, by Holm's step-down method.

  Holm 1979, "A simple sequentially rejective multiple test procedure": below
  alpha are then, with probability 1 - alpha, no differences but true ones.

  Args:
    p_values: shape=(n,); NaN is no test, and does not count.

  Returns:
    Shape=(n,), at most 1; NaN where there was NaN.
  """
  p = np.asarray(p_values, np.float64)
  result = np.full(p.shape, np.nan)
  (known,) = np.nonzero(~np.isnan(p))
  order = known[np.argsort(p[known], kind="stable")]
  left = len(order) - np.arange(len(order))
  result[order] = np.minimum(np.maximum.accumulate(left * p[order]), 1)
  return result


def power(
  mean: float,
  std: float,
  seeds: int,
  alpha: float = ALPHA,
  samples: int = 1,
) -> float:
  """Return the probability that a t test finds a difference.

  Args:
    mean: the true difference.
    std: the true standard deviation of a difference within a seed, > 0; for
      unrelated samples of that between two seeds.
    seeds: of each setting, >= 2.
    alpha: level of the two-sided test.
    samples: 1: paired; 2: two samples that share nothing, of equal variance.
  """
  freedom = samples * (seeds - 1)
  critical = stats.t.ppf(1 - alpha / 2, freedom)
  shift = abs(mean) / std * math.sqrt(seeds)
  found = float(stats.nct.sf(critical, freedom, shift))
  other = float(stats.nct.cdf(-critical, freedom, shift))
  # Far in its tail scipy has no value of the second, which is 0 there.
  return found + (0.0 if math.isnan(other) else other)


def seeds_needed(
  mean: float,
  std: float,
  *,
  wanted: float = POWER,
  alpha: float = ALPHA,
  samples: int = 1,
) -> int | None:
  """Return how many seeds a t test needs to find a difference.

  Args:
    mean: the difference, taken to be the true one.
    std: see `power`.
    wanted: probability with which it is found.
    alpha: level of the two-sided test.
    samples: see `power`.

  Returns:
    At least 2; None where it is beyond `MOST_SEEDS`, or mean or spread is 0 or
    unknown.

  Example:
    seeds_needed(0.01, 0.02)  # 34
  """
  if not (std > 0 and abs(mean) > 0):
    return None
  enough = lambda n: power(mean, std, n, alpha, samples) >= wanted
  # Of a normal distribution, a few less than of a t distribution.
  quantiles = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(wanted)
  guess = (quantiles * std / mean) ** 2
  if guess > MOST_SEEDS:
    return None
  seeds = max(2, math.ceil(guess))
  while not enough(seeds):
    seeds += 1
  while seeds > 2 and enough(seeds - 1):
    seeds -= 1
  return seeds


def detectable(
  std: float, seeds: int, wanted: float = POWER, alpha: float = ALPHA
) -> float:
  """Return the smallest difference that so many seeds find.

  Args:
    std: see `power`; taken to be the true one.
    seeds: that there are.
    wanted: probability with which it is found.
    alpha: level of the two-sided paired t test.

  Returns:
    NaN for one seed, 0 without spread.
  """
  if seeds < 2 or math.isnan(std):
    return math.nan
  return std * _effect(seeds, wanted, alpha)


@functools.lru_cache
def _effect(seeds: int, wanted: float, alpha: float) -> float:
  """Return what is detectable where the standard deviation is 1."""
  missing = lambda effect: power(effect, 1.0, seeds, alpha) - wanted
  most = 2.0
  while missing(most) < 0:
    most *= 2
  return float(optimize.brentq(missing, 1e-9, most))


def _half_width(std: float, count: int, confidence: float) -> float:
  if count < 2:
    return math.nan
  quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
  return quantile * std / math.sqrt(count)


def _p_value(mean: float, std: float, count: int) -> float:
  if not std > 0:
    return math.nan
  statistic = abs(mean) / std * math.sqrt(count)
  return float(2 * stats.t.sf(statistic, count - 1))


def _correlation(spreads: tuple[float, float], std: float) -> float:
  """Return the correlation of two samples, by the spread of a difference."""
  a, b = spreads
  if not a * b > 0:
    return math.nan
  return float(np.clip((a**2 + b**2 - std**2) / (2 * a * b), -1, 1))


def _point(values: np.ndarray) -> Interval:
  """Return the interval of values without spread; NaN of a single one."""
  middle = float(np.mean(values))
  return Interval(middle, middle) if len(values) > 1 else NO_INTERVAL
