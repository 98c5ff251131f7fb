"""Audits: the epsilon that the canaries of a private run betray.

Lower bounds from what `canaries` leave behind. One that is above the upper
bound of accountants means that the noise, the clipping, the sampling or the
account is wrong.

Two look at the whole run: who was in, by the scores of all rounds together.
They doubt everything, and need e^epsilon canaries and more to reach an epsilon.
Two look at single rounds: how long a contribution was, which is no matter of
chance, and how many deviations of the noise a canary moved a sum. They find the
noise multiplier that there really is, from as many samples as there are
canaries and rounds, and the ledger tells its epsilon: these trust the sampling
and the account.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.privacy import library
from fedjax_sim.privacy.accounting import MOST_MULTIPLIER, Ledger
from fedjax_sim.privacy.canaries import KINDS, Evidence

SIGNIFICANCE = 0.05
LEAST_MULTIPLIER = 0.03  # below, accountants' floats overflow
TOLERANCE = 1e-4  # of a length; more than float32 sums are wrong by
RESAMPLES = 200
_TESTS = 3  # by chance: one_run, clopper_pearson, gaussian


class Audit(NamedTuple):
  """What the canaries betray; all bounds hold at once, with the confidence.

  Attributes:
    canaries: how many there were.
    included: how many of them took part.
    claimed: the epsilon of the accountant.
    epsilon: the largest of the bounds below; infinite, if a sum had what no
      contributions of at most 1 can add up to.
    confidence: that no bound is above the true epsilon; of an honest run that
      it is not accused.
    longest: a canary's longest contribution, where 1 is the most.
    multiplier: the noise multiplier is at most this; infinite: it is not told.
    clip: a lower bound of epsilon: of a sum with the noise that is claimed and
      the longest contribution. No matter of chance.
    gaussian: a lower bound, of Gaussian noise: epsilon with `multiplier`.
    clopper_pearson: a lower bound, whatever the noise is, if the scores of
      canaries are independent, as those without common coordinates are.
    one_run: a lower bound, even if they are not (arXiv 2305.08846, Theorem
      5.2).
    bootstrap: what may be read off the scores without any confidence: the 95 %
      interval of the estimate, by the bootstrap. No bound.
  """

  canaries: int
  included: int
  claimed: float
  epsilon: float
  confidence: float
  longest: float
  multiplier: float
  clip: float
  gaussian: float
  clopper_pearson: float
  one_run: float
  bootstrap: tuple[float, float]

  @property
  def accused(self) -> bool:
    """Whether the claim is refuted."""
    return self.epsilon > self.claimed

  def describe(self) -> str:
    """What was found, in a sentence for summaries."""
    told = (
      f"epsilon >= {self.epsilon:.3g} betrayed by {self.canaries} canaries"
      f" ({self.confidence:.0%})"
    )
    if not self.accused:
      return told
    what = (
      f"a contribution was {self.longest:.3g} long, where 1 is the most"
      if self.longest > 1 + TOLERANCE
      else "the noise, the sampling or the account is wrong"
    )
    return f"{told}: refutes the claim of {self.claimed:.3g}; {what}"


def audit(
  evidence: Evidence,
  ledger: Ledger,
  rounds: int,
  significance: float = SIGNIFICANCE,
) -> Audit:
  """Lower bounds of epsilon from what canaries left behind.

  Each of the three bounds by chance may be wrong with a third of
  `significance`, so all hold together (Bonferroni).

  Args:
    evidence: of the run, numpy.
    ledger: that claims an epsilon.
    rounds: that were run.
    significance: how often one of the bounds may be wrong.
  """
  included = np.asarray(evidence.included)
  size, each = len(included), significance / _TESTS
  present, absent = (
    [np.asarray(x, np.float64) for x in moments]
    for moments in (evidence.present, evidence.absent)
  )
  scores = (present[1] + absent[1])[:size]
  taken, left = scores[included], scores[~included]
  longest = float(evidence.longest)
  multiplier, clip = math.inf, 0.0
  gaussian = pearson = one_run = 0.0
  interval = (0.0, 0.0)
  finite = all(np.isfinite(x).all() for x in (*present, *absent))
  if not finite or math.isinf(longest):
    gaussian = clip = math.inf  # no contributions of at most 1 can do that
  else:
    if longest > 1 + TOLERANCE:
      clip = epsilon(ledger, ledger.release.multiplier / longest, rounds)
    if ledger.release.noise == "gaussian":
      if ledger.release.sensitivity is None:
        apart = moved(present, absent, size, each) * float(evidence.unit)
        if apart > 0:
          multiplier = 1 / apart
          gaussian = epsilon(ledger, multiplier, rounds)
      elif ledger.participation.rate == 1:
        gaussian = _of_separation(separation(taken, left, each), ledger.delta)
    if min(len(taken), len(left)) >= 2:
      auditing = library("jax_privacy.auditing")
      auditor = auditing.CanaryScoreAuditor(taken, left)
      pearson = float(
        auditor.epsilon_clopper_pearson(each, ledger.delta, one_sided=False)
      )
      one_run = float(auditor.epsilon_one_run(each, ledger.delta))
      low, high = auditor.epsilon_raw_counts(
        min_count=max(1, len(left) // 20),
        delta=ledger.delta,
        bootstrap_params=auditing.BootstrapParams(RESAMPLES, seed=0),
      )
      interval = (float(low), float(high))
  return Audit(
    canaries=size,
    included=int(included.sum()),
    claimed=ledger.epsilon(rounds),
    epsilon=max(clip, gaussian, pearson, one_run),
    confidence=1 - significance,
    longest=longest,
    multiplier=multiplier,
    clip=clip,
    gaussian=gaussian,
    clopper_pearson=pearson,
    one_run=one_run,
    bootstrap=interval,
  )


def epsilon(ledger: Ledger, multiplier: float, rounds: int) -> float:
  """What the ledger would tell, were the noise so much.

  Args:
    ledger: of the run.
    multiplier: at least; smaller ones count as a small one, so that what comes
      out is finite, and a lower bound still.
    rounds: that were run.
  """
  claimed = ledger.release.multiplier
  if multiplier > MOST_MULTIPLIER:
    return 0.0
  multiplier = max(multiplier, min(LEAST_MULTIPLIER, claimed))
  release = ledger.release._replace(multiplier=multiplier)
  return dataclasses.replace(ledger, release=release).epsilon(rounds)


def moved(
  present: Any, absent: Any, size: int, significance: float
) -> float:
  """A lower bound of how many deviations a canary moves a sum.

  The largest of those of all canaries, of each kind and of the worst case, each
  with its share of the significance (Bonferroni). A contribution along a
  canary's direction is at most 1, and the noise there is what it is everywhere,
  so rounds without a canary tell of the noise for all kinds.

  Args:
    present: number, total, squares of scores, each shape=(size + 1,), float64;
      of the rounds in which a canary took part; the worst case is the last.
    absent: of the others.
    size: how many canaries, the worst case apart.
    significance: how often the bound may be wrong.
  """
  kind = np.arange(size) % len(KINDS)
  groups = [np.arange(size)]
  groups += [np.flatnonzero(kind == k) for k in range(len(KINDS))]
  groups += [np.array([size])]
  without = _Sample.of([x[:size] for x in absent])
  return max(
    _separation(
      _Sample.of([x[group] for x in present]),
      without,
      significance / len(groups),
    )
    for group in groups
  )


def separation(
  taken: np.ndarray, left: np.ndarray, significance: float
) -> float:
  """A lower bound of how many deviations two Gaussians are apart.

  Args:
    taken: shape=(n,), float64; the sample with the greater mean.
    left: shape=(m,), float64.
    significance: how often the bound may be wrong.
  """
  samples = (
    _Sample.of([np.ones(len(x)), x - left.mean(), (x - left.mean()) ** 2])
    if len(left)
    else _Sample(0.0, 0.0, 0.0)
    for x in (taken, left)
  )
  return _separation(*samples, significance)


class _Sample(NamedTuple):
  """Of how many numbers, their mean, and their squared distances from it."""

  number: float
  mean: float
  scatter: float

  @classmethod
  def of(cls, moments: Any) -> _Sample:
    """From numbers, totals and squares of its parts."""
    number, total, squares = (float(x.sum()) for x in moments)
    if number == 0:
      return cls(0.0, 0.0, 0.0)
    mean = total / number
    return cls(number, mean, max(squares - total * mean, 0.0))


def _separation(taken: _Sample, left: _Sample, significance: float) -> float:
  """A lower bound of how many deviations two Gaussians are apart.

  The t statistic of two samples of one variance has a noncentral t law, whose
  parameter is the separation over (1/n + 1/m)^(1/2); 0 if it is not above 0.
  """
  free = taken.number + left.number - 2
  pooled = taken.scatter + left.scatter
  if min(taken.number, left.number) < 1 or free < 1 or pooled == 0:
    return 0.0
  spread = math.sqrt(1 / taken.number + 1 / left.number)
  t = (taken.mean - left.mean) / (math.sqrt(pooled / free) * spread)
  stats, optimize = library("scipy.stats"), library("scipy.optimize")
  # As the parameter grows, so small a chance of at most t remains.
  beyond = lambda parameter: stats.nct.sf(t, free, parameter) - significance
  if t <= 0 or beyond(0.0) >= 0:
    return 0.0
  found: float = optimize.brentq(beyond, 0.0, t)
  return found * spread


def _of_separation(apart: float, delta: float) -> float:
  """Epsilon of two Gaussians that are so many deviations apart."""
  if apart == 0:
    return 0.0
  return float(library("dp_accounting").get_epsilon_gaussian(1 / apart, delta))
