"""What a call of the compiled round is given, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import PyTree
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.engine import plan
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.engine.traffic import Traffic

Row = dict[str, float]
Columns = dict[str, np.ndarray]  # all of the same length


class DivergedError(FedjaxSimError, RuntimeError):
  """A round left no client, or no global model, with finite numbers."""

  exit_code = 1


class PlannedRounds(NamedTuple):
  """Rounds laid out on the host, ready to be sent.

  Attributes:
    first: rounds done before them.
    num_rounds: how many they are.
    cohorts: their plans behind an axis of rounds, which may be longer.
    examples: the data of the call, on the devices; as `Residency.put` gives.
    key: the lanes and the cohort size that they were laid out for.
    waste: what they compute in vain.
    seconds: what planning took.
    attacked: whether clients may attack (`Sampler.byzantine`).
  """

  first: int
  num_rounds: int
  cohorts: plan.CohortPlan
  examples: PyTree
  key: tuple[int, int]
  waste: plan.PaddingWaste
  seconds: float
  attacked: bool = False


class DispatchResult(NamedTuple):
  """The result of one call of the compiled program.

  Attributes:
    state: the run's state after it.
    rows: one row of metrics a round, up to a failure.
    rejected: (round, client ids) of updates that were not finite.
    failure: the error of the round after them, if it failed; then `state` is
      of no use.
    clients: clients that trained.
    waste: what was computed, and what of it in vain.
    steps: local steps that clients took in each pass, shape=(passes,).
    seconds: what the call took, planning not counted.
    plan_seconds: what planning took; it overlaps with the call before.
    sent_bytes: that a device sent to the others in each round; None: not known.
    client_log: name -> values, a line for every client of a cohort: `round`,
      `client`, `present` and what else is logged; empty unless clients are
      logged.
  """

  state: RunState
  rows: list[Row]
  rejected: list[tuple[int, np.ndarray]]
  failure: DivergedError | None
  clients: int
  waste: plan.PaddingWaste
  steps: np.ndarray
  seconds: float
  plan_seconds: float
  sent_bytes: float | None
  client_log: Columns


class ReadMetrics(NamedTuple):
  """Metrics of several rounds on the host; fields as in `DispatchResult`."""

  rows: list[Row]
  rejected: list[tuple[int, np.ndarray]]
  failure: DivergedError | None
  client_log: Columns


def check_follows(planned: PlannedRounds, done: int) -> None:
  """Refuse a plan of other rounds than those that follow.

  Args:
    planned: the plan.
    done: number of rounds that the state has behind it.

  Raises:
    ValueError: it is one.
  """
  if planned.first != done:
    raise ValueError(
      f"The plan is of round {planned.first + 1}, the state of round {done};"
      " plan the rounds that follow the state."
    )


def read_metrics(
  metrics: RoundMetrics,
  planned: PlannedRounds,
  traffic: Traffic,
  chain: Sequence[str],
) -> ReadMetrics:
  """Read the metrics of a call, up to the first round that failed.

  Args:
    metrics: on the host, with a leading axis of rounds.
    planned: the rounds that it ran.
    traffic: what a client receives and sends in a round.
    chain: the transforms' names, in their order.
  """
  rows: list[Row] = []
  rejected: list[tuple[int, np.ndarray]] = []
  logs: list[Columns] = []
  for i in range(planned.num_rounds):
    one: RoundMetrics = jax.tree.map(lambda x, i=i: x[i], metrics)
    round_ = planned.first + i + 1
    ids = np.sort(planned.cohorts.client[i][one.client_rejected])
    if one.rejected:
      rejected.append((round_, ids))
    failure = _failure(round_, one, ids)
    if failure is not None:
      return ReadMetrics(rows, rejected, failure, _joined(logs))
    rows.append(_row(round_, one, traffic, chain))
    here = plan.at_round(planned.cohorts, i)
    if planned.attacked:
      rows[-1]["clients_byzantine"] = int((here.byzantine > 0).sum())
    if one.client_values:
      lines = _client_lines(round_, here, one)
      if not planned.attacked:
        del lines["byzantine"]
      logs.append(lines)
  return ReadMetrics(rows, rejected, None, _joined(logs))


def dispatched(
  state: RunState,
  planned: PlannedRounds,
  read: ReadMetrics,
  seconds: float,
  sent_bytes: float | None,
) -> DispatchResult:
  """Return the result of one call of the compiled program.

  Args:
    state: the state after it.
    planned: the rounds that it ran.
    read: their metrics.
    seconds: what the call took.
    sent_bytes: what a device sent to the others in each round; None if unknown.
  """
  return DispatchResult(
    state=state,
    rows=read.rows,
    rejected=read.rejected,
    failure=read.failure,
    clients=int((planned.cohorts.client >= 0).sum()),
    waste=planned.waste,
    steps=planned.cohorts.num_steps.sum((0, 1, 2, 3), dtype=np.int64),
    seconds=seconds,
    plan_seconds=planned.seconds,
    sent_bytes=sent_bytes,
    client_log=read.client_log,
  )


def observed(
  planned: PlannedRounds, metrics: RoundMetrics
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Return what a sampler observes of a single round, in the clients' order.

  Args:
    planned: the round.
    metrics: on the host, with a leading axis of rounds.

  Returns:
    The clients' ids, shape=(cohort,), int64; whether each is in the aggregate,
    shape=(cohort,), bool; name -> its values, shape=(cohort,).
  """
  order = _in_order(planned.cohorts.client[0])
  pick = lambda x: np.asarray(x[0]).ravel()[order]
  return (
    pick(planned.cohorts.client).astype(np.int64),
    ~pick(metrics.client_rejected),
    {name: pick(x) for name, x in metrics.observed.items()},
  )


def _in_order(client: np.ndarray) -> np.ndarray:
  """Return the places of a plan's clients, flat, in the order of their ids."""
  filled = np.flatnonzero(client.ravel() >= 0)
  return filled[np.argsort(client.ravel()[filled])]


def _client_lines(
  round_: int, cohort: plan.CohortPlan, metrics: RoundMetrics
) -> Columns:
  """Return a round's lines of the clients' log, in the order of their ids.

  Args:
    round_: which round it is.
    cohort: its plan.
    metrics: of the round.
  """
  order = _in_order(cohort.client)
  pick = lambda x: np.asarray(x).ravel()[order]
  values = {k: pick(v) for k, v in metrics.client_values.items()}
  return {
    "round": np.full(len(order), round_, np.int32),
    "client": pick(cohort.client),
    "present": ~pick(metrics.client_rejected),
    "byzantine": pick(cohort.byzantine) > 0,
    "weight": values.pop("weight"),
    **dict(sorted(values.items())),
  }


def _joined(logs: Sequence[Columns]) -> Columns:
  names = logs[0] if logs else ()
  return {name: np.concatenate([log[name] for log in logs]) for name in names}


def _row(
  round_: int, metrics: RoundMetrics, traffic: Traffic, chain: Sequence[str]
) -> Row:
  clients, rejected = int(metrics.clients), int(metrics.rejected)
  row: Row = {"round": round_}
  for name, m in metrics.metrics.items():
    row[f"train/{name}"] = (
      float(m.total) / float(m.weight) if m.weight else math.nan
    )
  row["clients"] = clients
  row["clients_rejected"] = rejected
  row["bytes_down"] = _bytes_down(metrics, traffic)
  row["bytes_up"] = traffic.up * (clients + rejected)
  scheduled = {
    name.replace(".", "/"): float(value)
    for name, value in metrics.scheduled.items()
  }
  for name, value in metrics.state_metrics.items():
    scheduled.pop(name, None)  # what became of it, such as a clipping norm
    _put(row, name, value, "Algorithm.state_metrics")
  row |= scheduled
  for name in chain:
    seen = metrics.transforms[name]
    for key, value in seen.metrics.items():
      _put(row, f"{name}/{key}", value, f"the transform {name!r}")
    if seen.bytes is not None:  # of several in the chain the last one counts
      _put(row, f"{name}/bytes", seen.bytes, f"the transform {name!r}")
      each = traffic.up - traffic.update + traffic.links * float(seen.bytes)
      if traffic.coded:
        row["bytes_up"] = round(each * (clients + rejected))
  return row


def _bytes_down(metrics: RoundMetrics, traffic: Traffic) -> int:
  """Return what clients received in a round, all together."""
  cohort = int(metrics.clients) + int(metrics.rejected)
  if isinstance(metrics.broadcast_bytes, tuple):
    return traffic.down * cohort
  # The broadcast goes to all clients, the answer to a survey to the cohort.
  everyone = float(metrics.broadcast_bytes) * traffic.population
  return round(everyone) + (traffic.down - traffic.message) * cohort


def _put(row: Row, name: str, value: Any, owner: str) -> None:
  """Add a number to a row; refuse a name that is empty or taken."""
  if not name or name in row:
    raise ValueError(
      f"{owner} tells a number {name!r}, and every round has one of that name,"
      " or it is empty; rename it."
    )
  row[name] = float(value)


def _failure(
  round_: int, metrics: RoundMetrics, rejected: np.ndarray
) -> DivergedError | None:
  """Return the error that ends the run after this round; None if none does."""
  if metrics.nan_losses:
    return DivergedError(
      f"Round {round_}: clients ({named(rejected)}) have finite updates, but a"
      " loss or metric that is NaN. Has the model as many outputs as there are"
      " classes?"
    )
  if metrics.rejected and not metrics.clients:
    return DivergedError(
      f"Round {round_}: the updates of all {metrics.rejected} clients"
      f" ({named(rejected)}) are not finite; lower client.learning_rate, or"
      " clip."
    )
  if not metrics.finite:
    return DivergedError(
      f"Round {round_}: the global model is not finite after the server's"
      " step; lower server.learning_rate or client.learning_rate, or clip."
    )
  return None


def named(ids: np.ndarray, most: int = 10) -> str:
  """Return clients' ids for a message, not all if there are many."""
  listed = ", ".join(str(i) for i in ids[:most])
  return listed + (", ..." if len(ids) > most else "")
