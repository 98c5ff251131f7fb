"""The privacy account of a run: its ledger, its budget, its audit.

What training clients have to be protected from depends on the algorithm, the
sampler and the budget alone, so nothing here knows the simulator.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax

from fedjax_sim.core import (
  Aggregator,
  Algorithm,
  PrivacySpec,
  PyTree,
  Sampler,
  Transform,
  validate,
)
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.state import RunState
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.privacy import accounting
from fedjax_sim.privacy.accounting import promises
from fedjax_sim.privacy.central import audit as audits
from fedjax_sim.privacy.central import guard
from fedjax_sim.privacy.central import uncovered as outputs
from fedjax_sim.simulation import monitor
from fedjax_sim.simulation.dispatch import Row
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.state import States
from fedjax_sim.training import seal

DRAWN_ROUNDS = 1000  # of a run without an end, for which a promise is tested


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Account:
  """Counts the epsilon of a run and holds it to its budget.

  Attributes:
    release: what the algorithm releases in every round; None if it is not
      private.
    budget: delta, and perhaps the epsilon that must not be exceeded; None if no
      epsilon is counted.
    sampler: who takes part in a round.
    num_clients: number of clients that may take part.
  """

  release: PrivacySpec | None
  budget: guard.Budget | None
  sampler: Sampler
  num_clients: int

  @functools.cached_property
  def ledger(self) -> accounting.Ledger | None:
    """The ledger of a private run; None if no epsilon is counted.

    Raises:
      ValueError: no epsilon holds for this sampler and this release.
    """
    if self.release is None or self.budget is None:
      return None
    return guard.ledger(
      self.release, self.sampler, self.budget, self.num_clients
    )

  @property
  def public_clients(self) -> int:
    """The number of clients that the algorithm may know.

    If adding or removing a client must not show, it is the number that was
    chosen in advance.
    """
    part = self.sampler.participation
    if self.release is None or part is None:
      return self.num_clients
    return part.population or self.num_clients

  def epsilon_row(self, rounds: int) -> Row:
    """Return the epsilon after a number of rounds as a row of metrics.

    Of later rounds it may be that of a slightly later one, an upper bound (see
    `guard.counted`), but never one beyond the budget. It does not depend on how
    many rounds the run has.

    Args:
      rounds: number of rounds done.

    Returns:
      A row with one metric; an empty one if no epsilon holds, or if the noise
      was made for fewer rounds.
    """
    later = guard.counted(rounds)
    return self.exact_row(later if self._allows(later) else rounds)

  def exact_row(self, rounds: int) -> Row:
    """Return the epsilon after just these rounds as a row of metrics.

    Args:
      rounds: number of rounds done.

    Returns:
      As `epsilon_row`.
    """
    if self.ledger is None:
      return {}
    if rounds > (self.ledger.release.rounds or rounds):
      return {}
    epsilon = self.ledger.told(rounds)
    if math.isinf(epsilon):
      return {}
    simulated = self.ledger.release.simulated is not None
    name = "privacy/simulated_epsilon" if simulated else "privacy/epsilon"
    return {name: epsilon}

  def _allows(self, rounds: int) -> bool:
    """Return whether so many rounds have an epsilon, within the budget."""
    if self.ledger is None or self.budget is None:
      return False
    try:
      epsilon = self.ledger.epsilon(rounds)
    except ValueError:  # more than noise or accountant can do
      return False
    most = self.budget.epsilon
    return math.isfinite(epsilon) if most is None else epsilon <= most

  def rounds_within_budget(self, rounds: int) -> int:
    """Return how many of a number of rounds the privacy budget allows.

    Args:
      rounds: number of rounds wanted.

    Raises:
      ValueError: the noise was made for fewer rounds.
    """
    release = self.release
    if release is not None and rounds > (release.rounds or rounds):
      raise ValueError(
        f"server.rounds={rounds}: the correlated noise was made for"
        f" {release.rounds} rounds; make it for as many as there are."
      )
    if self.ledger is None or self.budget is None:
      return rounds
    if self.budget.epsilon is None:
      return rounds
    return self.ledger.rounds_within(self.budget.epsilon, rounds)

  def check_round(self, last: int) -> None:
    """Refuse a round beyond the privacy budget.

    Args:
      last: number of the round.

    Raises:
      ValueError: the budget does not allow it.
    """
    if self.rounds_within_budget(last) < last:
      raise ValueError(
        f"Round {last} would exceed the privacy budget, epsilon"
        f" {self.budget and self.budget.epsilon}; end before it."
      )

  def check_ledger(self, seed: int, coordinates: int) -> None:
    """Test the sampler's promise and how long floats can carry the noise.

    Args:
      seed: seed of the run.
      coordinates: number of numbers that a round releases.

    Raises:
      ValueError: the ledger cannot count this run.
    """
    if self.ledger is None:  # computing it refuses what it cannot count
      return
    assert self.budget is not None
    assert self.release is not None
    rounds = self.budget.rounds or self.release.rounds or DRAWN_ROUNDS
    promises.check_draws(self.sampler, self.num_clients, rounds, seed)
    guard.check_ends(self.ledger, rounds, coordinates)

  def audit(self, state: RunState) -> audits.Audit | None:
    """Measure what the canaries of a private run reveal.

    Args:
      state: state of the run.

    Returns:
      The audit; None without canaries, or if no epsilon is counted.
    """
    release = self.release
    if release is None or release.audited is None or self.ledger is None:
      return None
    evidence, rounds = jax.device_get(
      (jax.jit(release.audited)(state.server), state.round)
    )
    return audits.audit(evidence, self.ledger, int(rounds))


def check_budget(algorithm: Algorithm, budget: guard.Budget | None) -> None:
  """Refuse a budget that the algorithm has no use for.

  Args:
    algorithm: the algorithm of the run.
    budget: its privacy budget; None if it has none.

  Raises:
    TypeError: it is no `Budget`.
    ValueError: the algorithm is not private, or nobody has proven that it is.
  """
  if budget is None:
    return
  validate.instance("budget", budget, guard.Budget, "Budget(delta=1e-5)")
  if algorithm.privacy is None:
    raise ValueError(
      "budget is of a private algorithm, and this one is not; wrap it by"
      " privacy.central."
    )
  seal.check(algorithm)


def check_unwatched(
  best_metrics: Sequence[str], schedules: Mapping[str, Schedule]
) -> None:
  """Refuse to follow metrics of training clients, which no noise protects.

  Args:
    best_metrics: metrics, of each of which the best model is kept.
    schedules: hyper-parameter -> its schedule.

  Raises:
    ValueError: names the field that follows such a metric.
  """
  guard.check_watched(monitor.followed(schedules, best_metrics))


def uncovered(
  data: FederatedDataset,
  transforms: Sequence[Transform],
  runtime: Runtime,
  client_state: PyTree,
  *,
  log_clients: bool,
  finetuned: bool = False,
  initial: str | None = None,
) -> list[str]:
  """List what a run reveals of its clients that no epsilon would cover.

  Args:
    data: federated data.
    transforms: transforms of the client updates.
    runtime: whose "auto" settings are chosen by looking at the clients.
    client_state: table of client states, or its shapes.
    log_clients: whether every client is logged.
    finetuned: whether clients are evaluated after fine-tuning.
    initial: name of the weights file that the run begins from; None if it
      begins anew.
  """
  auto = [
    name
    for name in ("lanes", "residency", "state_residency")
    if getattr(runtime, name) == "auto"
  ]
  return outputs.uncovered(
    data,
    transforms,
    log_clients=log_clients,
    finetuned=finetuned,
    measured=auto,
    keeps_state=bool(jax.tree.leaves(client_state)),
    initial=initial,
  )


def check_noised(
  algorithm: Algorithm,
  aggregator: Aggregator,
  transforms: Sequence[Transform],
  states: States,
) -> None:
  """Refuse what would go around noise of clients or of secure aggregation.

  Args:
    algorithm: without central privacy.
    aggregator: how updates become one.
    transforms: what happens to an update.
    states: of the run.

  Raises:
    ValueError: a transform learns from clients without noise, or clients send
      more than the update that a noisy aggregator covers.
  """
  if not (algorithm.draws_noise or aggregator.draws_noise):
    return
  guard.check_transforms(transforms, states.variables.params)
  if not aggregator.draws_noise:
    return
  field, needs = "aggregator.noise_multiplier", algorithm.requirements
  unset = "take another algorithm, or unset it"
  if algorithm.survey is not None:
    raise ValueError(
      f"{field}: clients answer a survey, too, which gets no noise; {unset}."
    )
  if needs.pools_data:
    raise ValueError(
      f"{field} protects clients, and algorithm.name pools the data of all;"
      f" {unset}."
    )
  if needs.groups > 1:
    raise ValueError(
      f"{field}: all clients of a cohort make the noise of one sum together,"
      " and algorithm.name has a sum for each group of clients, with the noise"
      f" of its own clients alone; {unset}."
    )
  if needs.client_values:
    raise ValueError(
      f"{field}: algorithm.name wants numbers of every client by itself, such"
      f" as its loss, which get no noise; {unset}."
    )
  if algorithm.log_weight is not None:
    raise ValueError(
      f"{field}: every client weighs 1, and algorithm.name weighs them by their"
      " data; let all weigh the same by algorithm.weighting='uniform', or unset"
      " it."
    )
  hparams = states.traced()["algorithm"]
  report = report_shapes(algorithm, states.shapes.server, hparams)
  for part in ("buffers", "statistics"):
    if jax.tree.leaves(getattr(report, part)):
      raise ValueError(
        f"aggregator.noise_multiplier: clients send {part}, too, which get no"
        " noise; take another algorithm or model, or unset it."
      )
