"""Audits: the epsilon that the canaries of a private run betray.

Lower bounds from what `canaries` leave behind. One that is above the upper
bound of accountants means that the noise, the clipping, the sampling or the
account is wrong.

Two look at the whole run: who was in, by the scores of all rounds together.
They doubt everything, and need e^epsilon canaries and more to reach an epsilon.
Two look at single rounds: how long a contribution was, which is no matter of
chance, and how many deviations of the noise a canary moved a sum. They find the
noise multiplier that there really is, from as many samples as there are
canaries and rounds, and the ledger gives its epsilon: these trust the sampling
and the account.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedjax_sim.privacy import library
from fedjax_sim.privacy.accounting import MOST_MULTIPLIER, Ledger
from fedjax_sim.privacy.central.canaries import KINDS, Evidence, Moments

SIGNIFICANCE = 0.05
LEAST_MULTIPLIER = 0.03  # below, accountants' floats overflow
TOLERANCE = 1e-4  # of a length; more than float32 sums are wrong by
RESAMPLES = 200
# Of the noise: its standard deviation, for a multiplier of 1, and its kurtosis.
LAWS = {
  "gaussian": (1.0, 3.0),
  "laplace": (math.sqrt(2.0), 6.0),
  "discrete_gaussian": (1.0, 3.0),
}
# Of the significance; together they are 1, so all bounds hold at once.
SHARES = {"noise": 0.5, "clopper_pearson": 0.25, "one_run": 0.25}


class Audit(NamedTuple):
  """What canaries reveal; all bounds hold at once, with the confidence.

  Attributes:
    canaries: how many there were.
    included: how many of them took part.
    claimed: the epsilon of the accountant.
    epsilon: the largest of the bounds below; infinite, if a sum had what no
      contributions of at most 1 can add up to.
    confidence: that no bound is above the true epsilon, and so that an honest
      run is not accused.
    longest: a canary's longest contribution, where 1 is the most.
    multiplier: an upper bound of the noise multiplier; infinite: none found.
    clip: a lower bound of epsilon: of a sum with the noise that is claimed and
      the longest contribution. It is no matter of chance.
    noise: a lower bound: epsilon with `multiplier`. With correlated noise, for
      which there is none, that of Gaussian scores of the whole run, or 0 with
      sampling.
    clopper_pearson: a lower bound, whatever the noise is, if the scores of
      canaries are independent, as those without common coordinates are.
    one_run: a lower bound, even if they are not, as long as no score depends on
      another canary's coin (arXiv 2305.08846, Theorem 5.2).
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
  noise: float
  clopper_pearson: float
  one_run: float
  bootstrap: tuple[float, float]

  @property
  def accused(self) -> bool:
    """Whether the claim is refuted."""
    return self.epsilon > self.claimed

  def describe(self) -> str:
    """Return what was found, in a sentence for summaries."""
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
  resamples: int = RESAMPLES,
) -> Audit:
  """Return lower bounds of epsilon from what canaries left behind.

  The bounds that are matters of chance may be wrong with their `SHARES` of
  `significance`, so all hold together (Bonferroni).

  Args:
    evidence: of the run, numpy.
    ledger: the one that claims an epsilon.
    rounds: how many were run.
    significance: how often one of the bounds may be wrong.
    resamples: for the bootstrap; 0: without.
  """
  included = np.asarray(evidence.included)
  longest = float(evidence.longest)
  totals = [evidence.present.total[:-1], evidence.absent.total[:-1]]
  scores = np.asarray(np.sum(totals, axis=0, dtype=np.float64))
  found = Audit(
    canaries=len(included),
    included=int(included.sum()),
    claimed=ledger.epsilon(rounds),
    epsilon=math.inf,
    confidence=1 - significance,
    longest=longest,
    multiplier=math.inf,
    clip=0.0,
    noise=0.0,
    clopper_pearson=0.0,
    one_run=0.0,
    bootstrap=(0.0, 0.0),
  )
  moments = (*evidence.present, *evidence.absent)
  if not all(np.isfinite(x).all() for x in moments):
    return found  # no contributions of at most 1 can do that
  if longest > 1 + TOLERANCE:
    shorter = ledger.release.multiplier / longest
    found = found._replace(clip=epsilon(ledger, shorter, rounds))
  share = {name: significance * part for name, part in SHARES.items()}
  taken, left = scores[included], scores[~included]
  found = _by_rounds(found, evidence, ledger, rounds, share["noise"])
  if ledger.release.sensitivity is not None and ledger.participation.rate == 1:
    apart = separation(taken, left, share["noise"])
    found = found._replace(noise=_of_separation(apart, ledger.delta))
  if min(len(taken), len(left)) >= 2:
    found = _of_whole_run(found, taken, left, ledger.delta, share, resamples)
  bounds = (found.clip, found.noise, found.clopper_pearson, found.one_run)
  return found._replace(epsilon=max(bounds))


def _by_rounds(
  found: Audit,
  evidence: Evidence,
  ledger: Ledger,
  rounds: int,
  significance: float,
) -> Audit:
  """Return the audit with the bound from single rounds, of independent noise.

  Args:
    found: so far.
    evidence: of the run.
    ledger: of the run.
    rounds: how many were run.
    significance: of this bound.
  """
  if ledger.release.sensitivity is not None:
    return found
  deviation, kurtosis = LAWS[ledger.release.noise]
  apart = moved(evidence.present, evidence.absent, significance, kurtosis)
  if apart == 0:
    return found
  multiplier = 1 / (apart * deviation * float(evidence.unit))
  return found._replace(
    multiplier=multiplier, noise=epsilon(ledger, multiplier, rounds)
  )


def _of_whole_run(
  found: Audit,
  taken: np.ndarray,
  left: np.ndarray,
  delta: float,
  share: Mapping[str, float],
  resamples: int,
) -> Audit:
  """Return the audit with `jax_privacy.auditing`'s bounds from the whole run.

  Args:
    found: so far.
    taken: shape=(n,), float64; scores of canaries that took part.
    left: shape=(m,), float64; of the others.
    delta: of the (epsilon, delta) that is claimed.
    share: significance of each bound.
    resamples: as in `audit`.
  """
  auditing = library("jax_privacy.auditing")
  auditor = auditing.CanaryScoreAuditor(taken, left)
  pearson = auditor.epsilon_clopper_pearson(
    share["clopper_pearson"], delta, one_sided=False
  )
  one_run = auditor.epsilon_one_run(share["one_run"], delta)
  interval = found.bootstrap
  if resamples:
    low, high = auditor.epsilon_raw_counts(
      min_count=max(1, len(left) // 20),
      delta=delta,
      bootstrap_params=auditing.BootstrapParams(resamples, seed=0),
    )
    interval = (float(low), float(high))
  return found._replace(
    clopper_pearson=float(pearson), one_run=float(one_run), bootstrap=interval
  )


def epsilon(ledger: Ledger, multiplier: float, rounds: int) -> float:
  """Return the ledger's epsilon for another noise multiplier.

  Args:
    ledger: of the run.
    multiplier: of the noise; very small ones are raised to `LEAST_MULTIPLIER`
      or the claimed one, so that epsilon is finite, and still a lower bound.
    rounds: how many were run.
  """
  claimed = ledger.release.multiplier
  if multiplier > MOST_MULTIPLIER:
    return 0.0
  multiplier = max(multiplier, min(LEAST_MULTIPLIER, claimed))
  release = ledger.release._replace(multiplier=multiplier)
  return dataclasses.replace(ledger, release=release).epsilon(rounds)


def moved(
  present: Moments,
  absent: Moments,
  significance: float,
  kurtosis: float = 3.0,
) -> float:
  """Return a lower bound of how many deviations a canary moves a sum.

  It is the largest of several bounds: that of all canaries, which gets half of
  the significance, and those of each kind and of the worst case, which share
  the other half (Bonferroni). A contribution along a canary's direction is at
  most 1, and the noise there is what it is everywhere, so rounds without a
  canary show the noise for all kinds.

  Args:
    present: of the rounds in which a canary took part, the last of which is the
      worst case.
    absent: of the others.
    significance: how often the bound may be wrong.
    kurtosis: of the noise.
  """
  size = len(present.number) - 1
  kind = np.arange(size) % len(KINDS)
  few = [np.flatnonzero(kind == k) for k in range(len(KINDS))]
  few.append(np.array([size]))
  without = _Sample.of(absent, np.arange(size))

  def bound(group: np.ndarray, share: float) -> float:
    within = _Sample.of(present, group)
    return _separation(within, without, significance * share, kurtosis)

  parts = [bound(group, 0.5 / len(few)) for group in few]
  return max(bound(np.arange(size), 0.5), *parts)


def separation(
  taken: np.ndarray, left: np.ndarray, significance: float
) -> float:
  """Return a lower bound of how many deviations two Gaussians are apart.

  Args:
    taken: shape=(n,), float64; the sample with the greater mean.
    left: shape=(m,), float64.
    significance: how often the bound may be wrong.
  """
  one, other = (
    _Sample(len(x), x.mean(), len(x) * x.var()) if len(x) else _Sample(0, 0, 0)
    for x in (taken, left)
  )
  return _separation(one, other, significance)


class _Sample(NamedTuple):
  """The number, the mean, and the summed squared deviations of scores."""

  number: float
  mean: float
  scatter: float

  @classmethod
  def of(cls, moments: Moments, group: np.ndarray) -> _Sample:
    """Return the sample of the scores of a group of canaries."""
    number, total, squares = (
      float(np.asarray(x, np.float64)[group].sum()) for x in moments
    )
    mean = total / max(number, 1)
    return cls(number, mean, max(squares - total * mean, 0.0))


def _separation(
  taken: _Sample, left: _Sample, significance: float, kurtosis: float = 3.0
) -> float:
  """Return a lower bound of how many deviations two samples' laws differ.

  The t statistic of two Gaussian samples of one variance has a noncentral t
  law, whose parameter is the separation over (1/n + 1/m)^(1/2). Its bound is
  that of Johnson and Welch (1940, Biometrika 31, 362-389), which is exact for
  many numbers, and too low for few. Of other laws, the sample's variance varies
  as their kurtosis says.
  """
  free = taken.number + left.number - 2
  pooled = taken.scatter + left.scatter
  if min(taken.number, left.number) < 1 or free < 1 or pooled == 0:
    return 0.0
  spread = math.sqrt(1 / taken.number + 1 / left.number)
  t = (taken.mean - left.mean) / (math.sqrt(pooled / free) * spread)
  deviations = statistics.NormalDist().inv_cdf(1 - significance)
  bound = t * (1 - 1 / (4 * free))
  bound -= deviations * math.sqrt(1 + t**2 * (kurtosis - 1) / (4 * free))
  return max(bound, 0.0) * spread


def _of_separation(apart: float, delta: float) -> float:
  """Return the epsilon of two Gaussians that are so many deviations apart."""
  if apart == 0:
    return 0.0
  return float(library("dp_accounting").get_epsilon_gaussian(1 / apart, delta))
