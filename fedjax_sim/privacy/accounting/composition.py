"""What several runs on the same clients have spent together.

Runs that try clipping norms, rates or rounds on the same data all reveal
something about the same clients. Their epsilons do not simply add up, nor is
the largest one enough: their losses compose, as those of rounds do.

A run keeps its account in `privacy.json` in its workdir, from its beginning on
and for all of its rounds, since one that was stopped may go on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sim.core import validate
from fedjax_sim.privacy import draws
from fedjax_sim.privacy.accounting import accountants
from fedjax_sim.privacy.accounting.accountants import Step
from fedjax_sim.privacy.accounting.ledger import MEANING, Ledger

FILE = "privacy.json"


class Account(NamedTuple):
  """What a run releases about a client in all of its rounds.

  Attributes:
    name: of the run, for messages.
    step: one release.
    releases: how many.
    adjacency: as `Ledger.adjacency`.
    draws: what decides who takes part, with the seed as `seed`: runs in which
      it is equal have the same cohorts.
    noise_seed: of the noise; None: it is the run's own.
  """

  name: str
  step: Step
  releases: int
  adjacency: str
  draws: Mapping[str, Any]
  noise_seed: int | None = None


def facts(
  ledger: Ledger,
  rounds: int,
  draws: Mapping[str, Any],
  noise_seed: int | None = None,
) -> dict[str, Any]:
  """Return the account of a run, for `privacy.json`.

  Args:
    ledger: the run's.
    rounds: all that there may be, 1 or more.
    draws: as in `Account`.
    noise_seed: as in `Account`.
  """
  told = ledger.facts(rounds)
  return {**told, "draws": dict(draws), "noise_seed": noise_seed}


def read(workdir: Path) -> Account:
  """Return the account of the run in a workdir.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or of a simulated cohort.
  """
  path = workdir / FILE
  if not path.exists():
    raise FileNotFoundError(
      f"{path}: there is no such file; name the workdirs of private runs."
    )
  try:
    told = json.loads(path.read_bytes())
    (noise, multiplier, rate, fixed), count = told["steps"]
    account = Account(
      name=str(workdir),
      step=Step(str(noise), float(multiplier), float(rate), bool(fixed)),
      releases=int(count),
      adjacency=told["adjacency"],
      draws=told["draws"],
      noise_seed=told["noise_seed"],
    )
    simulated = told["simulated"]
    _ = MEANING[account.adjacency]
    _ = account.draws["seed"], account.draws["clients"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged ({error}); restore it.") from error
  if simulated is not None:
    raise ValueError(
      f"{workdir}: its epsilon is that of a simulated cohort, and does not hold"
      " for the clients that were trained; leave it out."
    )
  return account


def adjacency(accounts: Sequence[Account]) -> str:
  """Return the adjacency that holds for all accounts: theirs, or `zero-out`.

  Leaving out what a client sends changes no more than replacing it, and the
  same as removing it where rates do not depend on the number of clients.
  """
  kinds = {account.adjacency for account in accounts}
  return kinds.pop() if len(kinds) == 1 else "zero-out"


def epsilon(accounts: Sequence[Account], delta: float) -> float:
  """Return the epsilon of all runs together, by privacy loss distributions.

  Each run's noise and rounds count as settled before the first run; otherwise
  a run may depend on the results of others in any way.

  Args:
    accounts: of runs on the same clients, each once.
    delta: of (epsilon, delta)-differential privacy.

  Raises:
    TypeError, ValueError: two runs have the same noise, or cohorts that depend
      on each other in a way that no accountant knows, or discrete noise.
  """
  delta = validate.number("delta", delta, gt=0.0, lt=1.0)
  noisy = [a for a in accounts if a.noise_seed is not None]
  for one, other in itertools.combinations(noisy, 2):
    if one.noise_seed == other.noise_seed:
      raise ValueError(
        f"{one.name} and {other.name} have the same noise, from"
        f" privacy.noise_seed={one.noise_seed}: it cancels in their difference."
        " No epsilon holds for both; leave the seed unset."
      )
  for account in accounts:
    if account.step.noise == "discrete_gaussian":
      raise ValueError(
        f"{account.name} has noise='discrete_gaussian', which is counted by its"
        " Renyi divergences, and runs are composed by their loss distributions;"
        " leave it out, and add its own epsilon and delta to what the others"
        " have."
      )
  least = accountants.LEAST_MULTIPLIER
  if any(a.releases and a.step.multiplier < least for a in accounts):
    return math.inf
  # The rest is for the ends of the noise, as in a run's own ledger.
  return accountants.together(_drawn_apart(accounts), draws.KEPT * delta)


def _drawn_apart(accounts: Sequence[Account]) -> list[tuple[Step, int]]:
  """Return (step, count) of all runs, joined where cohorts are the same."""
  steps = [(a.step, a.releases) for a in accounts if a.step.rate == 1]
  sampled = [a for a in accounts if a.step.rate < 1]
  by_seed: dict[int, list[Account]] = {}
  for account in sampled:
    by_seed.setdefault(account.draws["seed"], []).append(account)
  for alike in by_seed.values():
    first = alike[0]
    for other in alike[1:]:
      same = first.draws == other.draws
      if not same or _kind(first.step) != _kind(other.step):
        raise ValueError(
          f"{first.name} and {other.name} draw clients with the same"
          f" seed={first.draws['seed']}, but not alike, so their cohorts depend"
          " on each other in a way that is not accounted for; give each run a"
          " seed of its own."
        )
    steps += _drawn_together(alike)
  return steps


def _kind(step: Step) -> Step:
  """Return what is equal in runs with the same cohorts: all but the noise."""
  return step._replace(multiplier=0.0)


def _drawn_together(accounts: Sequence[Account]) -> list[tuple[Step, int]]:
  """Return the joint steps of runs that have the same cohorts.

  A client that takes part in a round does so in all runs, and what they release
  of it is one vector, in units of each run's noise: with Gaussian noise the
  squares of the inverse multipliers add up, with Laplace noise the inverses.
  """
  steps = []
  done = 0
  for count in sorted({account.releases for account in accounts}):
    running = [a.step for a in accounts if a.releases >= count]
    power = 2 if running[0].noise == "gaussian" else 1
    longer = math.fsum(step.multiplier**-power for step in running)
    multiplier = longer ** (-1 / power)
    steps.append((running[0]._replace(multiplier=multiplier), count - done))
    done = count
  return steps
