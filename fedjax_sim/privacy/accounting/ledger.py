"""What a private run has spent: epsilon after any number of rounds.

A `Ledger` puts together what an algorithm releases (`core.PrivacySpec`) and
what a sampler promises (`sampling.Participation`), and says which two
federations it cannot tell apart:

- `zero-out`: one client sends nothing instead of its contributions; how many
  clients there are is public. Of samplers that draw everybody by itself, with a
  rate that follows from that number, and of clients that take turns: there, to
  add or remove one would change the others' rates or turns.
- `add-or-remove`: one client is there or not. Of samplers that draw everybody
  by itself, with a rate that was fixed in advance.
- `replace-one`: one client is another one; the sum moves twice as far. Of
  cohorts of a fixed size, in which another client takes the place of one that
  is not drawn.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fedjax_sim.core import Participation, PrivacySpec, validate
from fedjax_sim.privacy import draws
from fedjax_sim.privacy.accounting import accountants
from fedjax_sim.privacy.accounting.accountants import ACCOUNTANTS, Step

NOISES = ("gaussian", "laplace", "discrete_gaussian")
MOST_MULTIPLIER = 1e9  # accountants' floats do not hold the loss of more noise
MEANING = {
  "add-or-remove": "adding or removing one client",
  "replace-one": "replacing one client",
  "zero-out": "leaving out what one client sends, the number of clients public",
}


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The (epsilon, delta)-differential privacy of a run, round by round.

  Independent noise: of t rounds a client has a turn in t / period at most,
  rounded up, and takes part in each with probability rate. Correlated noise:
  without sampling, t rounds are one Gaussian release with the sensitivity of
  all of them (Denisov et al. 2022, arXiv 2202.08312); with sampling, a client's
  contributions must be orthogonal (bands <= period), and each is a sampled
  release with the sensitivity of one (Choquette-Choo et al. 2023, arXiv
  2306.08153).

  Attributes:
    release: what every round releases.
    participation: how often a client takes part; of a simulated cohort, how
      often it would.
    delta: from 0 to 1, exclusive; a thousandth of it is for the ends of the
      noise (`exposure`).
    accountant: a name in `ACCOUNTANTS`.

  Raises:
    TypeError, ValueError: a field that is out of range, or an accountant that
      cannot do this noise or this sampling.
  """

  release: PrivacySpec
  participation: Participation
  delta: float
  accountant: str = "pld"

  def __post_init__(self) -> None:
    release, participation = self.release, self.participation
    validate.instance("release", release, PrivacySpec, "Algorithm.privacy")
    validate.instance(
      "participation", participation, Participation, "Sampler.participation"
    )
    validate.one_of("noise", release.noise, NOISES)
    validate.one_of("accountant", self.accountant, ACCOUNTANTS)
    validate.number(
      "noise multiplier", release.multiplier, ge=0.0, le=MOST_MULTIPLIER
    )
    validate.number("delta", self.delta, gt=0.0, lt=1.0)
    validate.number("rate", participation.rate, gt=0.0, le=1.0)
    validate.integer("period", participation.period)
    if participation.population is not None and (
      participation.period > 1 or not participation.independent
    ):
      raise ValueError(
        f"population={participation.population} with"
        f" period={participation.period} and"
        f" independent={participation.independent}: turns, and places in a"
        " cohort, depend on how many clients there are; leave it None."
      )
    self._check_correlated()
    self._check_accountant()

  def _check_correlated(self) -> None:
    release, period = self.release, self.participation.period
    if release.sensitivity is None:
      return
    if release.noise != "gaussian":
      raise ValueError(
        f"noise={release.noise!r} cannot be correlated; take 'gaussian', or"
        " independent noise."
      )
    if self.participation.rate == 1:
      return
    if release.bands is None or release.bands > period:
      raise ValueError(
        f"bands={release.bands} with sampling of rate"
        f" {self.participation.rate:.3g}: rounds"
        f" {period} apart must not share noise; give bands <= {period}, or a"
        " sampler in which everybody takes part in a fixed order."
      )
    if release.rounds is None:
      raise ValueError(
        "release.rounds=None with correlated noise and sampling; tell how many"
        " rounds the noise is made for."
      )

  def _check_accountant(self) -> None:
    if self.release.noise == "discrete_gaussian":
      if self.accountant != "rdp":
        raise ValueError(
          f"accountant={self.accountant!r} counts on continuous noise, and on a"
          " lattice the direction of an update counts, too; of"
          " noise='discrete_gaussian' take 'rdp', whose moments of whole orders"
          " are the same."
        )
      return
    laplace, sampled = (
      self.release.noise == "laplace",
      self.participation.rate < 1,
    )
    if self.accountant == "rdp" and laplace and sampled:
      raise ValueError(
        "accountant='rdp' does not do Laplace noise with sampling; take 'pld'."
      )
    if self.accountant == "gdp" and (laplace or sampled):
      what = (
        "Laplace noise"
        if laplace
        else f"sampling of rate {self.participation.rate:.3g}"
      )
      raise ValueError(
        f"accountant='gdp' is exact only for Gaussian noise without sampling;"
        f" with {what} it would be an approximation and no bound. Take 'pld'."
      )

  @property
  def adjacency(self) -> str:
    """Which federations are neighbors: a name from the module's docstring."""
    rate, period, independent, population = self.participation
    if population is not None:
      return "add-or-remove"
    if independent or (rate == 1 and period > 1):
      return "zero-out"
    return "replace-one"

  def epsilon(self, rounds: int) -> float:
    """Return the epsilon after so many rounds; it depends on nothing else.

    Args:
      rounds: 0 or more.

    Returns:
      0 for no rounds; infinity without noise.

    Raises:
      TypeError, ValueError: no such number, or more rounds than the noise was
        made for.
    """
    validate.integer("rounds", rounds, ge=0)
    most = self.release.rounds
    if most is not None and rounds > most:
      raise ValueError(
        f"rounds={rounds} are more than the {most} that the noise was made for;"
        f" give at most {most}, or make noise for more."
      )
    if rounds == 0:
      return 0.0
    spent = self._counted(rounds)
    return spent if self._beyond(spent, rounds) <= 0 else math.inf

  def _counted(self, rounds: int) -> float:
    """Return the epsilon if noise has exactly the law that is counted."""
    step, count = self.steps(rounds)
    kept = draws.KEPT * self.delta
    return accountants.epsilon(self.accountant, step, count, kept)

  def _beyond(self, epsilon: float, rounds: int) -> float:
    """Return what inexact draws add to delta beyond the share kept for them.

    A release whose law is off by a total variation of d may add
    (1 + exp(epsilon)) d to delta.
    """
    added = 1 + math.exp(min(epsilon, 500.0))
    kept = (1 - draws.KEPT) * self.delta
    return added * rounds * self.release.distance - kept

  def check_draws(self, rounds: int, most: float | None) -> None:
    """Refuse a delta that is too small for how exactly noise is drawn.

    Args:
      rounds: of the run.
      most: an epsilon before which the run ends; None: no bound.

    Raises:
      ValueError: names delta.
    """
    epsilon = self._counted(rounds)
    epsilon = epsilon if most is None else min(epsilon, most)
    if math.isfinite(epsilon) and self._beyond(epsilon, rounds) > 0:
      added = (1 + math.exp(min(epsilon, 500.0))) * self.release.distance
      raise ValueError(
        f"delta={self.delta:g}: draws of noise='discrete_gaussian' that are"
        f" made of finitely many bits add {added * rounds:.2g} to it after"
        f" {rounds} rounds at epsilon {epsilon:.3g}, more than a thousandth;"
        " give a larger delta, or a smaller epsilon."
      )

  def exposure(self, rounds: int, coordinates: int) -> float:
    """Return a bound of how often the noise's finite range exposes a client.

    A release that no neighbor could have made has no epsilon; the rest of
    delta, beyond `draws.KEPT`, has to cover it.

    Args:
      rounds: 1 or more.
      coordinates: numbers that a round releases.
    """
    step, count = self.steps(rounds)
    if step.multiplier < accountants.LEAST_MULTIPLIER:
      return 0.0  # no epsilon is told
    if step.noise == "discrete_gaussian":
      return 0.0  # its ends are part of `PrivacySpec.distance`
    together = 1 if self.release.sensitivity is None else rounds
    bound = (
      draws.laplace_exposure
      if step.noise == "laplace"
      else draws.gaussian_exposure
    )
    each = bound(1 / step.multiplier, coordinates * together)
    return min(1.0, count * step.rate * each)

  def steps(self, rounds: int) -> tuple[Step, int]:
    """Return a client's contributions as a step, and their number.

    Args:
      rounds: 1 or more.
    """
    release, rate = self.release, self.participation.rate
    count = math.ceil(rounds / self.participation.period)
    replaced = self.adjacency == "replace-one"
    moved = 2.0 if replaced else 1.0
    if release.sensitivity is not None and rate == 1:
      moved *= release.sensitivity(rounds, self.participation.period)
      count = 1
    elif release.sensitivity is not None:
      assert release.rounds is not None
      moved *= release.sensitivity(release.rounds, release.rounds)
    multiplier = release.multiplier / moved
    fixed = replaced and rate < 1
    return Step(release.noise, multiplier, rate, fixed), count

  def rounds_within(self, epsilon: float, most: int) -> int:
    """Return the largest number of rounds, up to `most`, within epsilon.

    Raises:
      TypeError, ValueError: a number that is out of range.
    """
    validate.number("epsilon", epsilon, ge=0.0)
    validate.integer("rounds", most, ge=0)
    if self.release.rounds is not None:
      most = min(most, self.release.rounds)
    if self.epsilon(most) <= epsilon:
      return most
    low, high = 0, most
    while high - low > 1:
      middle = (low + high) // 2
      if self.epsilon(middle) <= epsilon:
        low = middle
      else:
        high = middle
    return low

  def told(self, rounds: int) -> float:
    """Return epsilon rounded up to four digits, so it holds as it reads."""
    return rounded_up(self.epsilon(rounds))

  def describe(self, rounds: int) -> str:
    """Return the guarantee after so many rounds, in a summary's sentence."""
    if math.isinf(self.told(rounds)):
      if math.isfinite(self._counted(rounds)):
        return f"none: draws of the noise may add more to delta={self.delta:g}"
      return (
        f"none: noise of less than {accountants.LEAST_MULTIPLIER} contributions"
        " is not counted as any"
      )
    period = self.participation.period
    rate = self.participation.rate
    if self.participation.independent:
      how = f"Poisson sampling of rate {rate:.3g}"
    elif rate < 1 or period == 1:
      how = f"cohorts of a fixed size, rate {rate:.3g}"
    else:
      how = "a fixed order"
    if rate < 1:
      how += ", the seed secret"
    if period > 1:
      how += f", at most once in {period} rounds"
    return (
      f"({self.told(rounds):g}, {self.delta:.15g})-DP for"
      f" {MEANING[self.adjacency]}, by {self.accountant.upper()}, {how}"
    )

  def facts(self, rounds: int) -> dict[str, Any]:
    """Return the guarantee and what it rests on, as texts and numbers.

    Epsilon is infinite without noise, and rounded as `told` does.
    """
    release, period = self.release, self.participation.period
    return {
      "rounds": rounds,
      "epsilon": self.told(rounds),
      "delta": self.delta,
      "adjacency": self.adjacency,
      "accountant": self.accountant,
      "noise": self.release.noise,
      "noise_multiplier": self.release.multiplier,
      "rate": self.participation.rate,
      "period": period,
      "bands": release.bands,
      "noise_rounds": release.rounds,
      "sensitivity": release.sensitivity(rounds, period)
      if release.sensitivity is not None and rounds
      else None,
      "simulated": release.simulated and list(release.simulated),
      "steps": [list(self.steps(rounds)[0]), self.steps(rounds)[1]]
      if rounds
      else None,
    }


def usual_accountant(noise: str) -> str:
  """Return the name in `ACCOUNTANTS` to use where none is given."""
  return "rdp" if noise == "discrete_gaussian" else "pld"


def rounded_up(epsilon: float) -> float:
  """Return epsilon rounded up to four digits, but for a float's rounding."""
  if epsilon == 0 or math.isinf(epsilon):
    return epsilon
  digits = 3 - math.floor(math.log10(epsilon))
  shown = float(f"{epsilon:.4g}")
  return (
    shown
    if shown >= epsilon * (1 - 1e-9)
    else round(shown + 10.0**-digits, digits)
  )


def check_delta(delta: float, num_clients: int) -> float:
  """Return `delta`, if it is less than one in `num_clients`.

  With more, giving away one client's data at random would count as private.

  Raises:
    TypeError, ValueError: it is not.
  """
  validate.integer("num_clients", num_clients)
  delta = validate.number("delta", delta, gt=0.0, lt=1.0)
  if delta >= 1 / num_clients:
    raise ValueError(
      f"delta={delta} would allow to give away one of {num_clients} clients;"
      f" give less than 1/{num_clients} = {1 / num_clients:.3g}."
    )
  return delta
