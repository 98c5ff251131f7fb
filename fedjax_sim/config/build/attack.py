"""Build the attack of a config, and what it makes of the other parts."""

from __future__ import annotations

from ml_collections import ConfigDict

from fedjax_sim.attacks import Attack, with_attackers, with_collusion
from fedjax_sim.attacks.algorithm import check_clients
from fedjax_sim.attacks.selection import SELECTIONS
from fedjax_sim.config import components
from fedjax_sim.core import Aggregator, Algorithm, Sampler, validate
from fedjax_sim.data import FederatedDataset
from fedjax_sim.privacy.secure.aggregators import SECURE

NOBODY = Attack()


def build_attack(config: ConfigDict, data: FederatedDataset) -> Attack:
  """Return the attack of a config; `NOBODY`'s if there is none.

  Args:
    config: complete.
    data: what clients train on.

  Raises:
    TypeError, ValueError: names the field, or another part of the config that
      this attack does not go with.
  """
  section = config.attack
  if section.name is None:
    return NOBODY
  validate.number("attack.fraction", section.fraction, ge=0, le=1)
  validate.one_of("attack.selection", section.selection, SELECTIONS)
  (slot,) = components.slots_of("attack")
  made: Attack = components.make(config, slot, num_classes=data.num_classes)
  validate.instance(
    f"attack.name={section.name!r}", made, Attack, "Attack(report=...)"
  )
  if made.collude is not None:
    _check_collusion(config)
  return made


def _check_collusion(config: ConfigDict) -> None:
  """Refuse parts that leave colluding attackers nothing to see, or replace."""
  field, privacy = f"attack.name={config.attack.name!r}", config.privacy
  if config.attack.fraction == 1:
    raise ValueError(
      f"attack.fraction=1.0: {field} is made of honest updates, and nobody is"
      " honest; give less than 1."
    )
  alone = "take an attack on data or on a client's own report, such as"
  own = "'sign_flip'"
  if privacy.mechanism is not None:
    raise ValueError(
      f"{field} replaces updates after privacy.mechanism={privacy.mechanism!r}"
      f" has clipped them, so its epsilon would not hold; {alone} {own}, which"
      " is clipped like all others."
    )
  if config.aggregator.name in SECURE:
    raise ValueError(
      f"{field} sees every update, and"
      f" aggregator.name={config.aggregator.name!r} shows none; {alone} {own}."
    )
  if config.server.stale_probability is not None:
    raise ValueError(
      f"{field} replaces updates of the round, and server.stale_probability="
      f"{config.server.stale_probability} lets some arrive in the next one;"
      f" {alone} {own}, or unset it."
    )
  for key in ("threshold", "word_threshold"):
    if config.leakage.get(key) is not None:
      raise ValueError(
        f"{field} keeps all updates, and leakage.{key}={config.leakage[key]}"
        f" counts on a weighted mean; {alone} {own}, or unset it."
      )
  if config.runtime.deterministic_reduction is not None:
    raise ValueError(
      f"{field} keeps all updates of a round, which every number of devices"
      " computes with in another way; unset runtime.deterministic_reduction,"
      f" or {alone} {own}."
    )


def effective_attack(config: ConfigDict, attack: Attack) -> Attack:
  """Return the attack without its functions where nobody ever attacks.

  A run of fraction 0 is, bit by bit, the one without an attack; only what it
  measures is measured all the same.

  Args:
    config: complete.
    attack: as `build_attack` returns it.
  """
  if config.attack.name is None or config.attack.fraction > 0:
    return attack
  return NOBODY._replace(measure=attack.measure)


def attacked_sampler(
  config: ConfigDict, sampler: Sampler, num_clients: int
) -> Sampler:
  """Return the sampler with the clients that attack.

  Args:
    config: complete.
    sampler: who takes part.
    num_clients: the population.

  Raises:
    ValueError: a private run hides how many clients there are, of which a
      fraction attacks.
  """
  section = config.attack
  if section.name is None:
    return sampler
  promised = sampler.participation
  if config.privacy.mechanism is not None and promised and promised.population:
    raise ValueError(
      f"sampler.population={promised.population} hides how many clients there"
      f" are, and attack.fraction={section.fraction} is of them: one more"
      " changes who else attacks. Unset sampler.population, or attack.name."
    )
  try:
    return with_attackers(
      sampler, num_clients, section.fraction, section.selection
    )
  except ValueError as error:
    raise ValueError(f"attack.{error}") from error


def attacked_aggregator(
  aggregator: Aggregator, algorithm: Algorithm, attack: Attack
) -> Aggregator:
  """Return the aggregator of a run with this attack.

  Args:
    aggregator: the one that is under attack.
    algorithm: complete.
    attack: as `effective_attack` returns it.

  Raises:
    ValueError: the attack does not go with it.
  """
  if attack.collude is not None:
    check_clients(algorithm)
    if algorithm.requirements.groups > 1:
      raise ValueError(
        "attack.name lets attackers see all updates of a round, and"
        " algorithm.name aggregates groups of clients, each by itself; take an"
        " attack on data or on a client's own report, such as 'sign_flip'."
      )
  return with_collusion(aggregator, attack)
