"""Answer `fedjax-sim privacy`: what noise, cohorts and rounds cost.

Before a run, and after several on the same clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim import reporting
from fedjax_sim.config import flags
from fedjax_sim.core import Participation, PrivacySpec, Sampler, validate
from fedjax_sim.privacy import accounting
from fedjax_sim.privacy.accounting import (
  Ledger,
  accountants,
  calibration,
  composition,
)
from fedjax_sim.sampling import SAMPLERS

_CLIENTS, _ROUNDS = "clients-per-round", "rounds"
_NOISE, _EPSILON = "noise-multiplier", "epsilon"
_GROUPS = "sampling-groups"
_ALWAYS = ("population", "delta")
_KINDS = {
  "sampling": "poisson",
  _GROUPS: "",
  "noise": "gaussian",
  "accountant": "",  # the usual one
}
_MOST = 10**12  # clients, and rounds
_MOST_ROUNDS = 10**6  # that are looked for
_SAMPLERS = ("poisson", "uniform", "cyclic", "cyclic_poisson")  # that promise
_POINTS = 40  # of the first curve
_SIZES = 12  # of the second


class _Setting:
  """The flags; those of all questions are checked at once, others when read."""

  def __init__(self, values: Any):
    self._values = values
    self.population = self.whole("population")
    delta = self.number("delta", gt=0, lt=1)
    self.delta = accounting.check_delta(delta, self.population)
    self.noise, self.sampling = (
      validate.one_of(f"--{name}", values[name].value, names)
      for name, names in (
        ("noise", accounting.NOISES),
        ("sampling", _SAMPLERS),
      )
    )
    self.accountant = validate.one_of(
      "--accountant",
      values["accountant"].value or accounting.usual_accountant(self.noise),
      accountants.ACCOUNTANTS,
    )

  def has(self, name: str) -> bool:
    return bool(self._values[name].value)

  def whole(self, name: str, most: int = _MOST) -> int:
    value = flags.number(f"--{name}", self._values[name].value, int)
    return validate.integer(f"--{name}", value, le=most)

  def number(self, name: str, **bounds: float) -> float:
    value = flags.number(f"--{name}", self._values[name].value, float)
    return validate.number(f"--{name}", value, **bounds)

  def clients(self) -> int:
    return self.whole(_CLIENTS, self.population)

  def rounds(self) -> int:
    return self.whole(_ROUNDS)

  def multiplier(self) -> float:
    return self.number(_NOISE, ge=0)

  def epsilon(self) -> float:
    return self.number(_EPSILON, gt=0)

  def sampler(self, clients: int) -> Sampler:
    """Return the sampler of cohorts of this many clients."""
    made: Sampler
    if self.sampling == "cyclic_poisson":
      groups = self.whole(_GROUPS, self.population)
      made = SAMPLERS[self.sampling](self.population, clients, groups)
    elif self.has(_GROUPS):
      raise flags.UsageError(
        f"--{_GROUPS} is of --sampling=cyclic_poisson, and it is"
        f" {self.sampling}; leave it out."
      )
    else:
      made = SAMPLERS[self.sampling](self.population, clients)
    return made

  def participation(self, clients: int) -> Participation:
    """Return the participation of a client, in cohorts of this many clients."""
    promised = self.sampler(clients).participation
    if promised is None:
      raise flags.UsageError(
        f"--sampling={self.sampling} promises nothing of how often a client"
        " takes part; take poisson."
      )
    return promised

  def ledger(self, clients: int, multiplier: float) -> Ledger:
    release = PrivacySpec(self.noise, multiplier)
    participation = self.participation(clients)
    return Ledger(release, participation, self.delta, self.accountant)

  def least_multiplier(
    self, clients: int, rounds: int, epsilon: float
  ) -> float:
    release = PrivacySpec(self.noise, 1.0)
    participation = self.participation(clients)
    budget = (rounds, self.delta, epsilon, self.accountant)
    return calibration.calibrate(release, participation, *budget).multiplier

  def most_clients(self, multiplier: float, rounds: int, epsilon: float) -> int:
    release = PrivacySpec(self.noise, multiplier)
    budget = (rounds, self.delta, epsilon, self.accountant)
    return calibration.calibrate_cohort(
      release, self.participation, self.population, *budget
    )

  def answer(self, clients: int, rounds: int, multiplier: float) -> str:
    ledger = self.ledger(clients, multiplier)
    cohort = self.sampler(clients).expected
    facts = {
      "clients a round": f"{clients:,} of {self.population:,}",
      "rounds": f"{rounds:,}",
      "noise multiplier": f"{multiplier:g} ({self.noise})",
      "noise on the mean": f"{multiplier / cohort:.3g} times the clip norm",
      "guarantee": ledger.describe(rounds),
    }
    metrics = {"epsilon": ledger.told(rounds)}
    return reporting.final_text(metrics, facts).rstrip()


def epsilon(arguments: Sequence[str]) -> str:
  """Return the epsilon of rounds with this noise, as text.

  Args:
    arguments: the flags; the same for all questions here.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value; the same for
      all questions here.
    TypeError, ValueError: numbers that do not go with each other; the same for
      all questions here.
  """
  values = flags.parse(arguments, *_ALWAYS, _CLIENTS, _ROUNDS, _NOISE, **_KINDS)
  given = _Setting(values)
  return given.answer(given.clients(), given.rounds(), given.multiplier())


def calibrate(arguments: Sequence[str]) -> str:
  """Find the one of clients, rounds and noise that is not given, by epsilon."""
  searched = (_CLIENTS, _ROUNDS, _NOISE)
  values = flags.parse(
    arguments, *_ALWAYS, _EPSILON, **dict.fromkeys(searched, ""), **_KINDS
  )
  given = _Setting(values)
  left_out = [name for name in searched if not given.has(name)]
  if len(left_out) != 1:
    raise flags.UsageError(
      f"privacy calibrate: give two of --{_CLIENTS}, --{_ROUNDS}, --{_NOISE};"
      " the third is found."
    )
  epsilon = given.epsilon()
  if left_out == [_CLIENTS]:
    rounds, multiplier = given.rounds(), given.multiplier()
    clients = given.most_clients(multiplier, rounds, epsilon)
  elif left_out == [_ROUNDS]:
    clients, multiplier = given.clients(), given.multiplier()
    rounds = _most_rounds(given.ledger(clients, multiplier), epsilon)
  else:
    clients, rounds = given.clients(), given.rounds()
    multiplier = given.least_multiplier(clients, rounds, epsilon)
  return given.answer(clients, rounds, multiplier)


def _most_rounds(ledger: Ledger, epsilon: float) -> int:
  if (least := ledger.epsilon(1)) > epsilon:
    raise ValueError(
      f"--{_EPSILON}={epsilon:g} is less than the {least:.3g} of one round;"
      f" give a larger --{_NOISE}, or fewer --{_CLIENTS}."
    )
  most = 1
  while ledger.epsilon(2 * most) <= epsilon:
    most *= 2
    if most > _MOST_ROUNDS:
      raise ValueError(
        f"--{_EPSILON}={epsilon:g} allows more than {most:,} rounds, beyond"
        f" which they are not counted; give less --{_NOISE}, or more"
        f" --{_CLIENTS}."
      )
  return ledger.rounds_within(epsilon, 2 * most)


def curve(arguments: Sequence[str]) -> str:
  """Draw epsilon by round and noise by cohort; return a text with the files.

  Raises:
    OSError: a file cannot be written.
  """
  either = {_NOISE: "", _EPSILON: ""}
  values = flags.parse(
    arguments, *_ALWAYS, _CLIENTS, _ROUNDS, "out", **either, **_KINDS
  )
  given = _Setting(values)
  clients, rounds = given.clients(), given.rounds()
  if given.has(_NOISE):
    multiplier = given.multiplier()
  elif given.has(_EPSILON):
    multiplier = given.least_multiplier(clients, rounds, given.epsilon())
  else:
    raise flags.UsageError(
      f"privacy curve: give --{_NOISE}, or --{_EPSILON}, or both."
    )
  ledger = given.ledger(clients, multiplier)
  epsilon = given.epsilon() if given.has(_EPSILON) else ledger.epsilon(rounds)
  if math.isinf(ledger.epsilon(rounds)):
    raise flags.UsageError(
      f"--{_NOISE}={multiplier:g} is no noise, and no curve; give more."
    )
  if epsilon <= 0:
    raise flags.UsageError(
      f"--{_NOISE}={multiplier:g} leaves an epsilon of 0 after {rounds} rounds,"
      " and no curve; give less."
    )
  folder = Path(values["out"].value)
  folder.mkdir(parents=True, exist_ok=True)  # before time is spent
  cohort = given.sampler(clients).expected
  by_round = [
    reporting.Setting(t, clients, multiplier, ledger.epsilon(t), cohort)
    for t in _whole(np.linspace(1, math.sqrt(rounds), _POINTS) ** 2)
  ]
  most = given.population
  if given.has(_GROUPS):
    most //= given.whole(_GROUPS)
  sizes = np.geomspace(max(1, clients // 10), most, _SIZES)
  by_cohort = [
    reporting.Setting(
      rounds,
      size,
      given.least_multiplier(size, rounds, epsilon),
      epsilon,
      given.sampler(size).expected,
    )
    for size in _whole(sizes)
    if given.ledger(size, multiplier).adjacency == ledger.adjacency
  ]
  title = ledger.describe(rounds)
  picture, table = folder / "privacy.png", folder / "privacy.csv"
  reporting.draw_privacy_curves(by_round, by_cohort, picture, title)
  reporting.write_privacy_curves(by_round, by_cohort, table)
  return f"{given.answer(clients, rounds, multiplier)}\n\n{picture}\n{table}"


def _whole(values: np.ndarray) -> list[int]:
  """Return the values rounded and sorted, each once."""
  return sorted({round(value) for value in values.tolist()})


def compose(arguments: Sequence[str]) -> str:
  """Return the epsilon of the runs in several workdirs together, as text.

  Raises:
    OSError: a file cannot be read.
  """
  folders, rest = flags.positional(arguments)
  workdirs = [Path(folder) for folder in folders]
  values = flags.parse(rest, "delta")
  delta = flags.number("--delta", values.delta, float)
  validate.number("--delta", delta, gt=0, lt=1)
  if not workdirs:
    raise flags.UsageError("privacy compose: name the runs' workdirs.")
  if len({path.resolve() for path in workdirs}) < len(workdirs):
    raise flags.UsageError("privacy compose: name every workdir once.")
  accounts = [composition.read(path) for path in workdirs]
  accounting.check_delta(delta, max(a.draws["clients"] for a in accounts))
  alone = [composition.epsilon([one], delta) for one in accounts]
  spent = composition.epsilon(accounts, delta)
  facts = {
    account.name: f"epsilon {accounting.rounded_up(epsilon):g} alone"
    for account, epsilon in zip(accounts, alone, strict=True)
  }
  told = accounting.rounded_up(spent)
  neighbors = accounting.MEANING[composition.adjacency(accounts)]
  facts["guarantee"] = (
    "none: a run has no noise"
    if math.isinf(told)
    else f"({told:g}, {delta:.15g})-DP for {neighbors}, by PLD, of all"
    f" {len(accounts)} runs together"
  )
  return reporting.final_text({"epsilon": told}, facts).rstrip()
