"""Evaluate a state, and let an evaluation change what comes next.

Evaluation sets are the central test set (`test`), the held-out examples of
training clients (`seen`), and clients that never train (`unseen`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import (
  Algorithm,
  Array,
  PyTree,
  Task,
  Variables,
  validate,
)
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine import client_metrics
from fedjax_sim.engine import residency as residencies
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_metrics import ClientMetrics
from fedjax_sim.engine.evaluation import EvaluationSet, as_blocks, of_model
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.state import Best, MonitorState, RunState
from fedjax_sim.privacy.central import guard
from fedjax_sim.simulation import monitor, preflight
from fedjax_sim.simulation.dispatch import Row
from fedjax_sim.simulation.lanes import Choice
from fedjax_sim.simulation.row_store import OwnRows, RowStore


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluator:
  """Evaluates states on the central test set and on seen and unseen clients.

  Attributes:
    task: what is evaluated.
    algorithm: which may give clients of `seen` models of their own.
    data: federated data, whose `prepare` applies to every batch.
    batchings: for every pass, what a client does.
    mesh: the devices.
    lanes: chooses how many clients a device trains at once.
    batch_size: number of examples that are evaluated at once, at most.
    asked: the residency that was asked for.
    residency: the name of the one that training examples have.
    rows: client states on the disk; None if they are on the devices.
  """

  task: Task
  algorithm: Algorithm
  data: FederatedDataset
  batchings: Sequence[LocalBatching]
  mesh: Mesh
  lanes: Callable[[], Choice]
  batch_size: int
  asked: str
  residency: str
  rows: RowStore | None = None

  @functools.cached_property
  def parts(self) -> dict[str, FederatedData]:
    """The data of `test`, `seen` and `unseen`, as far as they exist."""
    parts = dict[str, FederatedData]()
    if self.data.test is not None:
      parts["test"] = as_blocks(self.data.test, self.batch_size)
    for name in ("seen", "unseen"):
      part = getattr(self.data, name)
      if part is not None:
        parts[name] = part
    return parts

  @functools.cached_property
  def room(self) -> float:
    """Bytes that one of `parts` may take on a device."""
    return residencies.evaluation_room(
      self.asked, self.residency, self.mesh, len(self.parts)
    )

  @functools.cached_property
  def sets(self) -> dict[str, EvaluationSet]:
    """The evaluation set of each of `parts`."""
    if not self.parts:
      return {}
    # About as many examples at once as in training.
    widest = max(batching.batch_size for batching in self.batchings)
    lanes = max(1, self.lanes().lanes * widest // self.batch_size)
    return {
      name: EvaluationSet(
        self.task,
        self.algorithm,
        part,
        mesh=self.mesh,
        lanes=lanes,
        batch_size=self.batch_size,
        personal=name == "seen",
        by_client=name != "test",
        prepare=self.data.prepare,
        room=self.room,
        rows=None if self.rows is None else OwnRows(self.rows, self.mesh),
      )
      for name, part in self.parts.items()
    }

  def __call__(
    self, state: RunState, names: Collection[str] | None = None
  ) -> Row:
    """Return the metrics of a state, such as `unseen/accuracy/p10`.

    Args:
      state: the state.
      names: which of `sets` to evaluate; None for all.
    """
    return as_row(self.measure(state, names))

  def measure(
    self, state: RunState, names: Collection[str] | None = None
  ) -> dict[str, ClientMetrics]:
    """Return the metrics of every client of several sets.

    The clients of `test` are blocks of its examples.

    Args:
      state: the state.
      names: which of `sets` to evaluate; None for all.
    """
    wanted = self.sets if names is None else names
    return {
      name: evaluate(state)
      for name, evaluate in self.sets.items()
      if name in wanted
    }

  def clients(self, state: RunState, name: str) -> ClientMetrics:
    """Return the metrics of every client of `seen` or `unseen`.

    Raises:
      UnknownNameError: the data have no such set.
    """
    return validate.lookup("evaluation set", name, self.sets)(state)


def as_row(measured: Mapping[str, ClientMetrics]) -> Row:
  """Return the metrics of a state as a row.

  Args:
    measured: as `Evaluator.measure` returns it.

  Returns:
    Metrics such as `test/accuracy` or `unseen/accuracy/p10`.
  """
  row: Row = {}
  for name, metrics in measured.items():
    if name == "test":
      row |= {f"test/{k}": v for k, v in metrics.overall().items()}
    else:
      row |= metrics.summary(name)
  return row


def metric_names(
  metrics: Mapping[str, bool], models: Iterable[str], data: FederatedDataset
) -> dict[str, str]:
  """Return the names of what an evaluation measures.

  Args:
    metrics: name of each of the task's numbers -> whether there are its mean
      and percentiles over clients.
    models: names of the models that are evaluated, "" for the global one.
    data: federated data.

  Returns:
    Name, such as `unseen/loss/mean` -> the task's metric, such as `loss`.
  """
  names = {}
  for (metric, spread), model in itertools.product(metrics.items(), models):
    name = of_model(model, metric)
    if data.test is not None:
      names[f"test/{name}"] = metric
    for prefix, part in (("seen", data.seen), ("unseen", data.unseen)):
      if part is not None:
        told = client_metrics.told(name, prefix, spread=spread)
        names |= dict.fromkeys(told, metric)
  return names


def directions(
  schedules: Mapping[str, Schedule],
  best_metrics: Sequence[str],
  *,
  task: Task,
  models: Callable[[], Mapping[str, Variables]],
  data: FederatedDataset,
) -> dict[str, bool]:
  """Return for every metric that is followed whether higher is better.

  Args:
    schedules: hyper-parameter -> its schedule.
    best_metrics: metrics, of each of which the best model is kept.
    task: what is evaluated.
    models: gives shapes and dtypes of the models that are evaluated, by name;
      "" is the global one.
    data: federated data.

  Raises:
    ValueError: a metric is not evaluated, or the task does not say.
  """
  wanted = monitor.followed(schedules, best_metrics)
  if not wanted:
    return {}
  evaluated = models()
  metrics = preflight.metrics_of(task, evaluated[""], data)
  names = metric_names(metrics, evaluated, data)
  return monitor.directions(wanted, names, task)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reaction:
  """The reaction to an evaluation: a function of state and metrics.

  The algorithm sees the metrics, schedules may follow them, and the best models
  are kept, or one of them is restored.

  Attributes:
    algorithm: the algorithm, which may have an `on_eval`.
    schedules: hyper-parameter -> its schedule.
    higher_is_better: for every metric that is followed, its direction.
    best_metrics: metrics, of each of which the best model is kept.
    revert_to_best: after an evaluation without a better value of the first of
      them, go on with its best model.
    mesh: the devices.
    shapes: shapes and dtypes of a state.
    spec: how a state lies on the devices.
    copied: server state -> a copy, since the one of the run may be donated.
  """

  algorithm: Algorithm
  schedules: Mapping[str, Schedule]
  higher_is_better: Mapping[str, bool]
  best_metrics: Sequence[str]
  revert_to_best: bool
  mesh: Mesh
  shapes: RunState
  spec: RunState
  copied: Callable[[PyTree], PyTree]

  def __call__(
    self, state: RunState, metrics: Row, *, ends: bool = False
  ) -> RunState:
    """Return the state after an evaluation.

    Args:
      state: the state that was evaluated.
      metrics: what the evaluation measured.
      ends: whether the run ends here, so that the model must stay the one that
        was evaluated.
    """
    server = self._server_after(state.server, metrics)
    watch = self._schedules_after(state.watch, metrics)
    best = {
      metric: self._best_after(metric, best, metrics, server, state.round)
      for metric, best in watch.best.items()
    }
    after = state._replace(server=server, watch=watch._replace(best=best))
    if self.revert_to_best and not ends and self.best_metrics[0] in metrics:
      return self.continued(after)
    return after

  @property
  def followers(self) -> list[str]:
    """What makes the run depend on its evaluations, for messages."""
    found = [
      f"the schedule of {name}"
      for name, schedule in self.schedules.items()
      if schedule.metric is not None
    ]
    if self.algorithm.on_eval is not None:
      found.append("the algorithm")
    return found + ["server.revert_to_best"] * self.revert_to_best

  def continued(self, state: RunState) -> RunState:
    """Return the state after an evaluation of a run that goes on.

    Args:
      state: the same, of a run that ends, with `ends`.
    """
    if not self.revert_to_best:
      return state
    best = state.watch.best[self.best_metrics[0]]
    if int(best.round) in (-1, int(state.round)):
      return state
    return state._replace(server=self.copied(best.server))

  def _best_after(
    self, metric: str, best: Best, metrics: Row, server: PyTree, done: Array
  ) -> Best:
    """Return the best model by a metric after `done` rounds."""
    value = metrics.get(metric, math.nan)
    if not monitor.is_better(value, best, self.higher_is_better[metric]):
      return best
    numbers = np.float32(value), np.int32(jax.device_get(done))
    value_, round_ = distributed.put(numbers, self.mesh, P())
    return Best(value_, round_, self.copied(server))

  def _server_after(self, server: PyTree, metrics: Row) -> PyTree:
    """Return the server state after the algorithm has seen the metrics."""
    if self.algorithm.on_eval is None:
      return server
    if self.algorithm.privacy is not None:  # training clients are private
      own = guard.OF_CLIENTS
      metrics = {k: v for k, v in metrics.items() if not k.startswith(own)}
    server = self.algorithm.on_eval(server, metrics)
    # A copy of its own for every leaf, so that the state can be donated.
    server = jax.tree.map(
      lambda new, old: jnp.array(new, dtype=old.dtype, copy=True),
      server,
      self.shapes.server,
    )
    return distributed.put(server, self.mesh, self.spec.server)

  def _schedules_after(self, watch: MonitorState, metrics: Row) -> MonitorState:
    """Return the monitored state after the schedules have seen the metrics."""
    if not watch.schedules:
      return watch
    states = monitor.after(
      jax.device_get(watch.schedules),
      self.schedules,
      metrics,
      self.higher_is_better,
    )
    where = self.spec.watch.schedules
    return watch._replace(schedules=distributed.put(states, self.mesh, where))

  def best_row(self, state: RunState) -> Row:
    """Return value and round of the best models as metrics `best/...`.

    Args:
      state: state of the run.

    Returns:
      A row: for each metric that has a best model, such as `test/loss`, its
      `best/test/loss` and `best/test/loss/round`.
    """
    row: Row = {}
    for metric in self.best_metrics:
      best = state.watch.best[metric]
      if int(best.round) >= 0:
        row[f"best/{metric}"] = float(best.value)
        row[f"best/{metric}/round"] = int(best.round)
    return row
