"""What an epsilon allows: the least noise, the largest cohort.

How many rounds it allows is `accounting.Ledger.rounds_within`. All of them
are searches, since epsilon falls with noise and grows with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedjax_sim.core import Participation, PrivacySpec, validate
from fedjax_sim.privacy import library
from fedjax_sim.privacy.accounting.accountants import LEAST_MULTIPLIER
from fedjax_sim.privacy.accounting.ledger import Ledger, usual_accountant

_MOST_MULTIPLIER = 1e5
_PRECISION = 1e-4  # of a multiplier's logarithm


def calibrate(
  release: PrivacySpec,
  participation: Participation,
  rounds: int,
  delta: float,
  epsilon: float,
  accountant: str | None = None,
) -> PrivacySpec:
  """Return the release with the least noise that keeps within epsilon.

  Args:
    release: with any multiplier.
    participation: how often a client takes part.
    rounds: how many there will be.
    delta: as in `Ledger`.
    epsilon: what all rounds may spend together.
    accountant: as in `Ledger`; None: the usual one.

  Returns:
    `release` with a multiplier of four significant digits, the last rounded up.

  Raises:
    TypeError, ValueError: a number is out of range, or no noise is enough.
  """
  validate.integer("rounds", rounds)
  validate.number("epsilon", epsilon, gt=0.0)
  accountant = accountant or usual_accountant(release.noise)

  def spent(multiplier: float) -> float:
    noisy = release._replace(multiplier=multiplier)
    return Ledger(noisy, participation, delta, accountant).epsilon(rounds)

  high = 1.0
  while spent(high) > epsilon:
    high *= 4
    if high > _MOST_MULTIPLIER:
      raise ValueError(
        f"epsilon={epsilon:g} with delta={delta:g} after {rounds} rounds cannot"
        f" be reached with a noise multiplier of {high / 4:g}; give a larger"
        " epsilon."
      )
  low = high / 4
  while low > LEAST_MULTIPLIER and spent(low) <= epsilon:
    low, high = low / 4, low

  def excess(log_multiplier: float) -> float:
    # As logarithms the two are nearly proportional. Neither 0 nor infinity.
    there = min(max(spent(math.exp(log_multiplier)), 1e-9), 1e9)
    return math.log(there / epsilon)

  log_multiplier = library("scipy.optimize").brentq(
    excess, math.log(low), math.log(high), xtol=_PRECISION
  )
  digits = 3 - math.floor(log_multiplier / math.log(10))
  last = 10.0**-digits
  multiplier = round(math.exp(log_multiplier), digits)
  while spent(multiplier) > epsilon:
    multiplier = round(multiplier + last, digits)
  return release._replace(multiplier=multiplier)


def calibrate_cohort(
  release: PrivacySpec,
  participation: Callable[[int], Participation],
  population: int,
  rounds: int,
  delta: float,
  epsilon: float,
  accountant: str | None = None,
) -> int:
  """Return the largest cohort whose privacy keeps within epsilon.

  Args:
    release: what every round releases; its multiplier stays.
    participation: clients a round -> how often one takes part.
    population: how many clients there are.
    rounds: how many there will be.
    delta: as in `Ledger`.
    epsilon: what all rounds may spend together.
    accountant: as in `Ledger`; None: the usual one.

  Raises:
    TypeError, ValueError: a number is out of range, or even one client a round
      spends more.
  """
  validate.integer("population", population)
  validate.integer("rounds", rounds)
  validate.number("epsilon", epsilon, gt=0.0)
  accountant = accountant or usual_accountant(release.noise)

  def spent(cohort: int) -> float:
    ledger = Ledger(release, participation(cohort), delta, accountant)
    return ledger.epsilon(rounds)

  if spent(population) <= epsilon:
    return population
  if (least := spent(1)) > epsilon:
    raise ValueError(
      f"epsilon={epsilon:g} with delta={delta:g} after {rounds} rounds cannot"
      f" be reached: one client a round spends {least:.3g}; give a larger"
      " noise multiplier, or fewer rounds."
    )
  low, high = 1, population
  while high - low > 1:
    middle = (low + high) // 2
    if spent(middle) <= epsilon:
      low = middle
    else:
      high = middle
  return low
