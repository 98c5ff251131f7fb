"""From the config's section `privacy` to a private algorithm and its budget."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim.config import components
from fedjax_sim.config.fields import fields_of
from fedjax_sim.core import Algorithm, Sampler, validate
from fedjax_sim.privacy import accounting, local
from fedjax_sim.privacy.accounting import calibration, composition
from fedjax_sim.privacy.central import (
  CentralDPConfig,
  factorization,
  guard,
  with_central_dp,
)
from fedjax_sim.privacy.central.canaries import Canaries
from fedjax_sim.privacy.local import Randomizer
from fedjax_sim.privacy.secure import distributed_gaussian
from fedjax_sim.privacy.secure.aggregators import SECURE
from fedjax_sim.simulation.simulator import Simulator

_CORRELATED = ("banded", "blt")
_CENTRAL = (
  "clip_norm",
  "per_layer",
  "denominator",
  "max_weight",
  "noise_weights",
  "statistics_norm",
  "quantile",
  "quantile_rate",
  "extras_fraction",
)


def build_privacy(
  config: ConfigDict, algorithm: Algorithm, sampler: Sampler, num_clients: int
) -> tuple[Algorithm, guard.Budget | None]:
  """Return the algorithm, private if the config says so, and its budget.

  Without `privacy.noise_multiplier` the noise is the least with which all of
  the run's rounds stay below `privacy.target_epsilon`.

  Args:
    config: complete.
    algorithm: not private yet.
    sampler: who takes part.
    num_clients: that may take part.

  Raises:
    TypeError, ValueError: names the field.
    ImportError: the extra `privacy` is not installed.
  """
  _check_noise_seed(config)
  name = config.privacy.mechanism
  if name is None:
    return algorithm, None
  (slot,) = components.slots_of("privacy")
  given = components.given_fields(config, slot)
  other = config.local_privacy.mechanism
  if other is not None:
    raise ValueError(
      f"privacy.mechanism={name!r} trusts the server with clients' updates, and"
      f" local_privacy.mechanism={other!r} does not; unset one of them."
    )
  if "noise_multiplier" not in given and "target_epsilon" not in given:
    raise ValueError(
      f"privacy.mechanism={name!r} needs privacy.noise_multiplier, or"
      " privacy.target_epsilon, to which the noise is fitted."
    )
  _check_effect(given)
  weighting = config.algorithm.get("weighting", "uniform")
  if weighting != "uniform" and "max_weight" not in given:
    raise ValueError(
      f"algorithm.weighting={weighting!r}: weights depend on clients' data; set"
      " privacy.max_weight to bound them, or let all clients weigh the same by"
      " algorithm.weighting='uniform'."
    )
  budget = guard.Budget(
    delta=given["delta"],
    epsilon=given.get("target_epsilon"),
    rounds=config.server.rounds,
    **_some(given, "accountant"),
  )
  simulated = _simulated(config, given, num_clients)
  part = sampler.participation
  if name == "discrete_gaussian" and part is not None and part.population:
    raise ValueError(
      f"sampler.population={part.population} hides how many clients"
      " there are, and the whole numbers of"
      " privacy.mechanism='discrete_gaussian' are as fine as their number"
      " allows; unset it, or take 'gaussian'."
    )
  (own,) = components.slots_of("algorithm")
  taken = inspect.signature(own.factory(config.algorithm.name)).parameters
  if "num_clients" in taken and part is not None and part.population:
    raise ValueError(
      f"sampler.population={part.population} hides how many clients there are,"
      f" and algorithm.name={config.algorithm.name!r} is told their number"
      " ('num_clients'); unset sampler.population, or take another algorithm."
    )
  try:
    settings = CentralDPConfig(
      noise="gaussian" if name in _CORRELATED else name,
      most_clients=sampler.sizes[-1] if name == "discrete_gaussian" else None,
      noise_multiplier=given.get("noise_multiplier", 1.0),
      strategy=_strategy(config, name, given, sampler, simulated),
      simulated=simulated,
      canaries=_canaries(given, sampler),
      **{
        "denominator": _denominator(config, sampler),
        **_some(given, *_CENTRAL),
      },
    )
  except (TypeError, ValueError) as error:
    text = components.in_section(slot, name, str(error))
    raise type(error)(text) from error
  if "noise_multiplier" not in given:
    counted = guard.ledger(settings.release, sampler, budget, num_clients)
    fitted = calibration.calibrate(
      settings.release,
      counted.participation,
      config.server.rounds,
      budget.delta,
      given["target_epsilon"],
      budget.accountant,
    )
    settings = dataclasses.replace(settings, noise_multiplier=fitted.multiplier)
  return with_central_dp(algorithm, settings), budget


def _check_noise_seed(config: ConfigDict) -> None:
  """Refuse a seed of noise that nobody draws."""
  seed = config.privacy.noise_seed
  if seed is None:
    return
  validate.integer("privacy.noise_seed", seed, ge=0, le=2**32 - 1)
  if not draws_noise(config):
    raise ValueError(
      f"privacy.noise_seed={seed}: there is no noise; set privacy.mechanism,"
      " local_privacy.mechanism or aggregator.noise_multiplier, or unset it by"
      " --config.privacy.noise_seed=None."
    )


def draws_noise(config: ConfigDict) -> bool:
  """Return whether noise protects clients: central, local, or secure noise.

  Args:
    config: complete.
  """
  return any(
    (
      config.privacy.mechanism,
      config.local_privacy.mechanism,
      config.aggregator.get("noise_multiplier"),
    )
  )


def account(
  config: ConfigDict, simulator: Simulator, rounds: int
) -> dict[str, Any] | None:
  """Return the facts of a private run that `compose` needs from its workdir.

  Args:
    config: complete.
    simulator: what it describes.
    rounds: of the run.

  Returns:
    As `composition.facts`; None if no epsilon is counted.
  """
  if simulator.account.ledger is None:
    return None
  draws = dict(fields_of(config.sampler, "sampler."))
  draws["server.clients_per_round"] = config.server.clients_per_round
  part = simulator.sampler.participation
  clients = (part and part.population) or simulator.num_clients
  draws |= {"seed": simulator.seed, "clients": clients}
  noise_seed = config.privacy.noise_seed
  return composition.facts(simulator.account.ledger, rounds, draws, noise_seed)


def check_promise(
  config: ConfigDict,
  draw: Callable[..., Sampler],
  sampler: Sampler,
  sizes: tuple[int, int],
) -> None:
  """Refuse a sampler that is told, or promises, what a private run protects.

  Args:
    config: complete.
    draw: (clients, clients a round) -> the sampler.
    sampler: the one of these sizes.
    sizes: clients, and clients a round.

  Raises:
    ValueError: clients add noise, and who takes part depends on what they hold;
      or central privacy counts on a promise that does, or on a rate chosen in
      advance that depends on how many clients there are.
  """
  name, promised = config.sampler.name, sampler.participation
  (slot,) = components.slots_of("sampler")
  taken = inspect.signature(slot.factory(name)).parameters
  told = [known for known in ("sizes", "label_counts") if known in taken]
  owner = _noise_of_clients(config)
  if told and owner is not None and sampler.observe is None:
    raise ValueError(
      f"sampler.name={name!r} draws clients by what they hold ({told[0]!r}),"
      f" which they would have to tell without noise, and {owner} covers their"
      " updates alone; take 'uniform'."
    )
  if promised is None or config.privacy.mechanism is None:
    return
  if told:
    kind = "how many examples clients have"
    if "label_counts" in told:
      kind = "which labels clients have"
    raise ValueError(
      f"sampler.name={name!r} is told {kind}, on"
      f" which no privacy accountant can count; leave its argument {told[-1]!r}"
      " out, or let Sampler.participation be None."
    )
  if promised.population is not None:
    clients, wanted = sizes
    more = draw(clients + 1, wanted).participation
    if more != promised:
      raise ValueError(
        f"sampler.name={name!r}: Sampler.participation promises a rate that"
        f" was chosen in advance, for population={promised.population}; of"
        f" {clients} clients it is {promised}, of one more {more}. Let it not"
        " depend on their number, or leave population None."
      )


def _noise_of_clients(config: ConfigDict) -> str | None:
  """Return the field by which clients themselves add noise; None: none does."""
  name = config.local_privacy.mechanism
  randomizer = build_randomizer(config)
  if randomizer is not None and math.isfinite(local.guarantee(randomizer)[0]):
    return f"local_privacy.mechanism={name!r}"
  multiplier = config.aggregator.get("noise_multiplier")
  if multiplier is not None:
    return f"aggregator.noise_multiplier={multiplier}"
  return None


def check_weighting(config: ConfigDict) -> None:
  """Refuse weights that come from all clients' data, or count for nothing.

  Args:
    config: complete.

  Raises:
    ValueError: names the field.
  """
  (slot,) = components.slots_of("algorithm")
  weighting = config.algorithm.get("weighting")
  taken = inspect.signature(slot.factory(config.algorithm.name)).parameters
  clients, central = _noise_of_clients(config), config.privacy.mechanism
  owner = clients if central is None else f"privacy.mechanism={central!r}"
  if owner is None or weighting == "uniform":
    return
  if "mean_examples" in taken:
    raise ValueError(
      f"algorithm.name={config.algorithm.name!r} is told the mean number of"
      f" examples of all clients, which gets no noise, and {owner} covers what"
      " each of them sends alone; set algorithm.weighting='uniform', or take"
      " another algorithm."
    )
  if weighting is not None and owner.startswith("aggregator."):
    raise ValueError(
      f"algorithm.weighting={weighting!r}: with {owner} every client weighs 1;"
      " set it to 'uniform'."
    )


def _denominator(config: ConfigDict, sampler: Sampler) -> float:
  """Return the expected cohort size, by which sums are divided.

  Where the sampler has a population chosen in advance, it is
  `server.clients_per_round`: nothing that is released may depend on how many
  clients there are.
  """
  part = sampler.participation
  if part is None or part.population is None:
    return sampler.expected
  return float(config.server.clients_per_round)


def _check_effect(given: dict[str, Any]) -> None:
  """Refuse fields that have no effect without another, or that exclude it."""
  extras = ("quantile", "noise_weights", "statistics_norm")
  for field, needed in (
    ("quantile_rate", ("quantile",)),
    ("extras_fraction", extras),
  ):
    if field in given and not any(given.get(name) for name in needed):
      others = " or ".join(f"privacy.{name}" for name in needed)
      raise ValueError(
        f"privacy.{field}={given[field]} does nothing without {others}; set"
        " that, or unset it."
      )
  if "noise_cohort_size" in given and "denominator" in given:
    raise ValueError(
      f"privacy.denominator={given['denominator']}:"
      " privacy.noise_cohort_size scales the noise to the mean over the"
      " expected cohort; unset one of them."
    )


def build_randomizer(config: ConfigDict) -> Randomizer | None:
  """Return the mechanism of local privacy; None: there is none.

  Args:
    config: complete.
  """
  if config.local_privacy.mechanism is None:
    return None
  (slot,) = components.slots_of("local_privacy")
  made: Randomizer = components.make(config, slot)
  return made


def check_local_weights(config: ConfigDict, randomizer: Randomizer) -> None:
  """Refuse a weighting that the randomizer would ignore: every client weighs 1.

  Args:
    config: complete.
    randomizer: that of the section `local_privacy`.

  Raises:
    ValueError: names the field.
  """
  weighting = config.algorithm.get("weighting", "uniform")
  if weighting != "uniform" and not randomizer.weighs:
    raise ValueError(
      f"algorithm.weighting={weighting!r}: with"
      f" local_privacy.mechanism={randomizer.name!r} every client weighs 1;"
      " take 'gaussian' or 'laplace' with local_privacy.max_weight, and weights"
      " are sent with noise, or unset it."
    )


def local_guarantee(
  config: ConfigDict, sampler: Sampler, dimension: Callable[[], int]
) -> str:
  """Return what local privacy guarantees over the whole run; "" without it.

  Args:
    config: complete.
    sampler: who takes part: at most once in its period, else in every round.
    dimension: gives how many numbers an update has.

  Raises:
    ValueError: with so many reports no epsilon holds at its delta.
  """
  randomizer = build_randomizer(config)
  if randomizer is None:
    return ""
  part, numbers = sampler.participation, dimension()
  period = 1 if part is None else part.period
  reports = math.ceil(config.server.rounds / period)
  if math.isfinite(local.guarantee(randomizer)[0]) and math.isinf(
    local.composed(randomizer, reports, numbers=numbers)
  ):
    raise ValueError(
      f"local_privacy.delta={randomizer.delta:g}: the ends of noise on"
      f" {numbers:,} numbers in {reports:,} reports betray more often than a"
      " thousandth of that; give a larger delta, or more noise."
    )
  return local.sentence(randomizer, reports, numbers=numbers)


def is_locally_private(config: ConfigDict, num_clients: int) -> bool:
  """Return whether local privacy has a finite epsilon.

  Raises:
    ValueError: its delta is at least 1 over the number of clients, and would
      allow single clients to be revealed.
  """
  randomizer = build_randomizer(config)
  if randomizer is None or math.isinf(local.guarantee(randomizer)[0]):
    return False
  if randomizer.delta:
    try:
      accounting.check_delta(randomizer.delta, num_clients)
    except ValueError as error:
      raise ValueError(f"local_privacy.{error}") from error
  return True


def secure_noise(
  config: ConfigDict, sampler: Sampler, dimension: Callable[[], int]
) -> str:
  """Return what the noise of secure aggregation does; "" without any.

  Args:
    config: complete.
    sampler: who takes part.
    dimension: gives how many numbers an update has.
  """
  secure = config.aggregator
  if secure.name not in SECURE or secure.noise_multiplier is None:
    return ""
  grid = distributed_gaussian.grid(
    sampler.sizes[-1], secure.noise_multiplier, bits=secure.bits
  )
  return distributed_gaussian.sentence(grid, dimension(), bool(secure.dropout))


def _some(given: dict[str, Any], *fields: str) -> dict[str, Any]:
  return {field: given[field] for field in fields if field in given}


def _canaries(given: dict[str, Any], sampler: Sampler) -> Canaries | None:
  if "canaries" not in given:
    return None
  validate.integer("privacy.canaries", given["canaries"], ge=20, le=10**6)
  part = sampler.participation
  return None if part is None else Canaries(given["canaries"], part)


def _simulated(
  config: ConfigDict, given: dict[str, Any], num_clients: int
) -> tuple[float, float] | None:
  """Return (cohort, population) whose noise is simulated; None if none is."""
  cohort = given.get("noise_cohort_size")
  if cohort is None:
    if "population" in given:
      raise ValueError(
        f"privacy.population={given['population']} is that of a simulated"
        " cohort; set privacy.noise_cohort_size, too."
      )
    return None
  least = config.server.clients_per_round
  validate.integer("privacy.noise_cohort_size", cohort)
  population = config.sampler.get("population")
  if population is not None:
    raise ValueError(
      f"sampler.population={population} is of"
      f" the cohort that is trained, and privacy.noise_cohort_size={cohort}"
      " tells the epsilon of another; unset one of them."
    )
  if cohort < least:
    raise ValueError(
      f"privacy.noise_cohort_size={cohort} is below"
      f" server.clients_per_round={least}; give the larger cohort whose noise"
      " is to be simulated."
    )
  population = validate.integer(
    "privacy.population", given.get("population", num_clients)
  )
  if population < cohort:
    raise ValueError(
      f"privacy.noise_cohort_size={cohort} exceeds the population of"
      f" {population}; set privacy.population."
    )
  return float(cohort), float(population)


def _strategy(
  config: ConfigDict,
  name: str,
  given: dict[str, Any],
  sampler: Sampler,
  simulated: tuple[float, float] | None,
) -> factorization.Strategy | None:
  rounds = config.server.rounds
  if name == "banded":
    if "bands" not in given:
      raise ValueError(
        "privacy.mechanism='banded' needs privacy.bands: over how many rounds"
        " noise is correlated, at most the period of sampler.name."
      )
    return factorization.banded(rounds, given["bands"])
  if name == "blt":
    part = sampler.participation
    if part is None or part.rate < 1:
      raise ValueError(
        "privacy.mechanism='blt' needs rounds between two participations of a"
        " client; set sampler.name='cyclic'."
      )
    part = guard.simulated_participation(part, simulated)
    return factorization.blt(rounds, part.period, **_some(given, "buffers"))
  return None
