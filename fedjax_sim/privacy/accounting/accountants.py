"""How much privacy a number of releases costs, by three kinds of accounting.

- `pld`: the distribution of the privacy loss (Koskela, Jälkö, Honkela 2020,
  arXiv 1906.03049), discretized by Connect the Dots (Doroshenko et al. 2022,
  arXiv 2207.04380) and composed by FFT; exact but for a small surplus.
- `rdp`: Rényi differential privacy (Mironov 2017, arXiv 1702.07476; of sampled
  Gaussians 2019, arXiv 1908.10530; of fixed-size samples Wang, Balle,
  Kasiviswanathan 2019, arXiv 1808.00087); looser, and good for any delta.
- `gdp`: Gaussian differential privacy (Dong, Roth, Su 2022, arXiv 1905.02383);
  exact, for Gaussian noise on everybody's contributions.

All of them give bounds: no epsilon is less than the true one. The divergences
of one release, and all of `rdp`, are dp-accounting's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.privacy import draws, library
from fedjax_sim.privacy.accounting.loss_distribution import (
  Composition,
  LossDistribution,
)

LEAST_MULTIPLIER = 0.01  # with less, one release loses thousands: no privacy
WHOLE_ORDERS = [*range(2, 65), *range(72, 257, 8), 512, 1024]
_POINTS = 50_000  # of a discretised loss, at most
_FINEST, _COARSEST = 3e-6, 1e-3  # its interval
_ROUNDING = 1e-14  # mass that an FFT makes up, a composition; 9e-15 measured


class Step(NamedTuple):
  """One release, in view of a client that is added, removed or replaced.

  Attributes:
    noise: `gaussian`, `laplace` or `discrete_gaussian`.
    multiplier: the noise's scale over how far that client can move the sum
      (L2; L1 with Laplace noise).
    rate: the probability that it takes part.
    fixed: whether cohorts have a fixed size, and neighbors differ in who this
      client is; otherwise clients are drawn independently, and neighbors differ
      in whether it is there.
  """

  noise: str
  multiplier: float
  rate: float = 1.0
  fixed: bool = False


def pld(step: Step, count: int, delta: float) -> float:
  """Return the epsilon of `count` releases by their privacy loss distribution.

  A fixed-size cohort of rate q has, by advanced joint convexity (Balle, Barthe,
  Gaboardi 2018, arXiv 1807.01647, theorem 2), for every epsilon >= 0 no larger
  a divergence than (1 - q) Q + q P has from Q, where P and Q are the noise with
  and without the sensitivity; for epsilon < 0 the same holds the other way
  round. The loss that has both as its divergences dominates (Zhu, Dong, Wang
  2022, arXiv 2106.08567), so its compositions are bounds. Composing either
  alone, as for Poisson sampling, is not known to be one (Lebeda et al. 2024,
  arXiv 2405.20769).

  Raises:
    ValueError: a delta so small that rounding errors would count.
  """
  if step.noise == "gaussian" and step.rate == 1:
    return gdp(step, count, delta)
  made_up = _check_rounding(count, delta)
  losses = _losses(step)
  return max(loss.epsilon(count, delta - made_up) for loss in losses)


def together(steps: Sequence[tuple[Step, int]], delta: float) -> float:
  """Return the joint epsilon of releases of several kinds, as `pld` does.

  Args:
    steps: each kind, and how many; drawn independently of one another. Later
      ones may follow from what earlier ones released; which kinds there are and
      how many of each was settled before.
    delta: of (epsilon, delta)-differential privacy.

  Raises:
    ValueError: a delta so small that rounding errors would count.
  """
  precision = 0.0  # Gaussian noise on everybody's contributions is one release
  kinds: dict[Step, int] = {}
  for step, count in steps:
    if count and step.multiplier < LEAST_MULTIPLIER:
      return math.inf
    if step.noise == "gaussian" and step.rate == 1:
      precision += count / step.multiplier**2
    elif count:
      kinds[step] = kinds.get(step, 0) + count
  if precision:
    kinds[Step("gaussian", precision**-0.5)] = 1
  if len(kinds) < 2:
    return max([pld(*one, delta) for one in kinds.items()], default=0.0)
  count = sum(kinds.values()) + len(kinds)
  made_up = _check_rounding(count, delta)
  wanted, most = zip(*map(_grid, kinds), strict=True)
  interval = max(min(wanted), max(most) / (4 * _POINTS))
  losses = [_losses(step, interval) for step in kinds]
  found = []
  for order in (0, 1):  # of the two federations
    parts = [
      loss[order % len(loss)].composed(count)
      for loss, count in zip(losses, kinds.values(), strict=True)
    ]
    whole = functools.reduce(Composition.joined, parts)
    found.append(whole.epsilon(delta - made_up))
  return max(found)


def _check_rounding(count: int, delta: float) -> float:
  """Return a bound of the mass that rounding adds in so many compositions.

  Raises:
    ValueError: it is not far below delta.
  """
  made_up = _ROUNDING * count
  if delta <= 10 * made_up:
    raise ValueError(
      f"delta={delta / draws.KEPT:g} is lost in rounding errors of the"
      f" accountant 'pld' after {count} releases; give at least"
      f" {10 * made_up:.1g}, or the accountant 'rdp'."
    )
  return made_up


def rdp(step: Step, count: int, delta: float) -> float:
  """Return the epsilon of `count` releases by about 160 Rényi divergences.

  Discrete Gaussian noise is counted by whole orders alone, at which it has the
  moments of a Gaussian (Canonne, Kamath and Steinke 2020, arXiv 2004.00010).
  Let P be N_Z(0, s^2) in every coordinate, and Q the same moved by a vector m
  of whole numbers. Over P the mean of (Q / P)^a is, sums being over all whole
  vectors x,

      exp((a^2 - a) |m|^2 / (2 s^2)) sum exp(-|x - a m|^2 / (2 s^2))
                                   / sum exp(-|x|^2 / (2 s^2)).

  If a is whole, x - a m runs over all whole vectors, too, and the sums are
  equal. What is left is the moment of Gaussians. Of a sampled release the
  binomial of ((1 - q) + q Q / P)^a has moments of whole orders only (arXiv
  1908.10530, section 3.3), as have the bounds of fixed-size samples (arXiv
  1808.00087); and the other order of neighbors is no worse (arXiv 1908.10530,
  theorem 5), since x -> m - x swaps P and Q.
  """
  orders, divergences = _renyi_divergences(step)
  compute = library("dp_accounting.rdp").compute_epsilon
  return float(compute(orders, count * divergences, delta)[0])


def gdp(step: Step, count: int, delta: float) -> float:
  """Return the epsilon of `count` Gaussian releases without sampling, exactly.

  They are mu-GDP with mu = sqrt(count) / multiplier; epsilon follows from
  theorem 8 of Balle and Wang 2018 (arXiv 1805.06530).
  """
  spread = step.multiplier / math.sqrt(count)
  with np.errstate(divide="ignore"):  # the logarithm of a delta of 0
    return float(library("dp_accounting").get_epsilon_gaussian(spread, delta))


ACCOUNTANTS: dict[str, Callable[[Step, int, float], float]] = {
  "pld": pld,
  "rdp": rdp,
  "gdp": gdp,
}


@functools.lru_cache(maxsize=4096)
def epsilon(accountant: str, step: Step, count: int, delta: float) -> float:
  """Return the epsilon of `count` releases; results are cached.

  Args:
    accountant: a name in `ACCOUNTANTS`.
    step: each release.
    count: how many releases.
    delta: of (epsilon, delta)-differential privacy.
  """
  if count == 0:
    return 0.0
  if step.multiplier < LEAST_MULTIPLIER:
    return math.inf
  return ACCOUNTANTS[accountant](step, count, delta)


def _loss(step: Step, added: bool) -> Any:
  """Return dp-accounting's loss of a release, for one order of neighbors."""
  mechanisms = library("dp_accounting.pld.privacy_loss_mechanism")
  make = {
    "gaussian": mechanisms.GaussianPrivacyLoss,
    "laplace": mechanisms.LaplacePrivacyLoss,
  }[step.noise]
  kinds = mechanisms.AdjacencyType
  return make(
    step.multiplier,
    sampling_prob=step.rate,
    adjacency_type=kinds.ADD if added else kinds.REMOVE,
  )


def _grid(step: Step) -> tuple[float, float]:
  """Return the interval of a release's discretized loss, and the largest."""
  most = float(_loss(step, added=False).connect_dots_bounds().epsilon_upper)
  # The surplus grows with the square of interval over the loss's deviation,
  # which is rate / multiplier or more.
  interval = min(step.rate / step.multiplier / 8, most / 500, _COARSEST)
  return max(interval, most / _POINTS, _FINEST), most


@functools.lru_cache(maxsize=16)
def _losses(
  step: Step, interval: float | None = None
) -> tuple[LossDistribution, ...]:
  """Return a release's losses, for every order of neighbors that counts."""
  fitting, most = _grid(step)
  interval = fitting if interval is None else interval
  removed, added = (_loss(step, added) for added in (False, True))
  if not step.fixed:
    return _discretized(removed, interval), _discretized(added, interval)
  top = math.ceil(most / interval)
  epsilons = interval * np.arange(top + 1)
  deltas = np.asarray(removed.get_delta_for_epsilon(epsilons))
  # Delta at -epsilon of one order follows from delta at epsilon of the other.
  mirrored = -np.expm1(-epsilons) + np.exp(-epsilons) * deltas
  both = np.concatenate([mirrored[:0:-1], deltas])
  return (LossDistribution(interval, -top, both),)


def _discretized(loss: Any, interval: float) -> LossDistribution:
  bounds = loss.connect_dots_bounds()
  lowest = math.floor(bounds.epsilon_lower / interval)
  highest = math.ceil(bounds.epsilon_upper / interval)
  losses = interval * np.arange(lowest, highest + 1)
  deltas = np.asarray(loss.get_delta_for_epsilon(losses))
  return LossDistribution(interval, lowest, deltas)


@functools.lru_cache(maxsize=16)
def _renyi_divergences(step: Step) -> tuple[np.ndarray, np.ndarray]:
  """Return the orders, and a release's Rényi divergence at each."""
  accounting = library("dp_accounting")
  relations = accounting.NeighboringRelation
  relation = relations.ADD_OR_REMOVE_ONE
  event = {
    "gaussian": accounting.GaussianDpEvent,
    "discrete_gaussian": accounting.GaussianDpEvent,
    "laplace": accounting.LaplaceDpEvent,
  }[step.noise](step.multiplier)
  if step.fixed:
    relation = relations.REPLACE_ONE
    event = accounting.SampledWithoutReplacementDpEvent(1, step.rate, event)
  elif step.rate < 1:
    event = accounting.PoissonSampledDpEvent(step.rate, event)
  orders = WHOLE_ORDERS if step.noise == "discrete_gaussian" else None
  accountant = library("dp_accounting.rdp").RdpAccountant(
    orders, neighboring_relation=relation
  )
  accountant.compose(event)
  return accountant.orders, accountant.rdp
