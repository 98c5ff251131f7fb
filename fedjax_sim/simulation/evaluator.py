"""Evaluate a state, and let an evaluation change what comes next.

Evaluation sets are the central test set (`test`), the held-out examples of
training clients (`seen`), and clients that never train (`unseen`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import Algorithm, PyTree, Task
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine import client_metrics
from fedjax_sim.engine.batching import LocalWork
from fedjax_sim.engine.evaluation import EvaluationSet, as_blocks
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.state import Best, RunState, Watch
from fedjax_sim.simulation import monitor
from fedjax_sim.simulation.dispatch import Row


def evaluation_data(
  data: FederatedDataset, batch_size: int
) -> dict[str, FederatedData]:
  """Return the data of `test`, `seen` and `unseen`, as far as they exist.

  Args:
    data: federated data.
    batch_size: number of examples of `test` in one block.
  """
  sets = dict[str, FederatedData]()
  if data.test is not None:
    sets["test"] = as_blocks(data.test, batch_size)
  for name, part in (("seen", data.seen), ("unseen", data.unseen)):
    if part is not None:
      sets[name] = part
  return sets


def evaluation_sets(
  parts: Mapping[str, FederatedData],
  *,
  task: Task,
  algorithm: Algorithm,
  data: FederatedDataset,
  works: Sequence[LocalWork],
  mesh: Mesh,
  lanes: int,
  batch_size: int,
  room: float,
) -> dict[str, EvaluationSet]:
  """Return what evaluates each part of the data.

  Args:
    parts: name -> its data, as `evaluation_data` gives them.
    task: what is evaluated.
    algorithm: which may give clients of `seen` models of their own.
    data: federated data, whose `prepare` applies to every batch.
    works: for every pass, what a client does.
    mesh: the devices.
    lanes: number of clients that a device trains at once.
    batch_size: number of examples of a client that are evaluated at once.
    room: bytes that one part may take on a device.
  """
  # About as many examples at once as in training.
  examples = lanes * max(work.batch_size for work in works)
  return {
    name: EvaluationSet(
      task,
      algorithm,
      part,
      mesh=mesh,
      lanes=max(1, examples // batch_size),
      batch_size=batch_size,
      personal=name == "seen",
      prepare=data.prepare,
      room=room,
    )
    for name, part in parts.items()
  }


def evaluate(
  sets: Mapping[str, EvaluationSet],
  state: RunState,
  names: Collection[str] | None = None,
) -> Row:
  """Evaluate a state on several sets.

  Args:
    sets: name -> what evaluates it.
    state: the state.
    names: which sets to evaluate; None for all.

  Returns:
    Metrics such as `test/accuracy` or `unseen/accuracy/p10`.
  """
  row: Row = {}
  for name, part in sets.items():
    if names is not None and name not in names:
      continue
    metrics = part(state)
    if name == "test":
      row |= {f"test/{k}": v for k, v in metrics.overall().items()}
    else:
      row |= metrics.summary(name)
  return row


def metric_names(
  metrics: Iterable[str], data: FederatedDataset
) -> dict[str, str]:
  """Return the names of what `evaluate` measures.

  Args:
    metrics: names of the task's metrics.
    data: federated data.

  Returns:
    Name, such as `unseen/loss/mean` -> the task's metric, such as `loss`.
  """
  names = {}
  for name in metrics:
    if data.test is not None:
      names[f"test/{name}"] = name
    for prefix, part in (("seen", data.seen), ("unseen", data.unseen)):
      if part is not None:
        names |= dict.fromkeys(client_metrics.told(name, prefix), name)
  return names


def followed(
  schedules: Mapping[str, Schedule], best_metric: str | None
) -> dict[str, str]:
  """Return which metrics decide on the run: who follows one -> the metric.

  Args:
    schedules: hyper-parameter -> its schedule.
    best_metric: metric that selects the best model; None without one.
  """
  result = {
    f"schedule of {name}: metric": schedule.metric
    for name, schedule in schedules.items()
    if schedule.metric is not None
  }
  if best_metric is not None:
    result["server.best_metric"] = best_metric
  return result


def best_row(best_metric: str | None, state: RunState) -> Row:
  """Return round and value of the best model as metrics `best/...`.

  Args:
    best_metric: metric that selects the best model; None without one.
    state: state of the run.

  Returns:
    A row; an empty one if there is no best model yet.
  """
  best = state.watch.best
  if best_metric is None or int(best.round) < 0:
    return {}
  return {
    "best/round": int(best.round),
    f"best/{best_metric}": float(best.value),
  }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reaction:
  """What follows from an evaluation: a function of state and metrics.

  The algorithm sees the metrics, schedules may follow them, and the best model
  is kept, or restored.

  Attributes:
    algorithm: the algorithm, which may have an `on_eval`.
    schedules: hyper-parameter -> its schedule.
    higher_is_better: for every metric that is followed, its direction.
    best_metric: metric that selects the best model; None to keep none.
    fall_back: go on with the best model after an evaluation without a better
      value.
    mesh: the devices.
    shapes: shapes and dtypes of a state.
    spec: how a state lies on the devices.
    copied: server state -> a copy, since the one of the run may be donated.
  """

  algorithm: Algorithm
  schedules: Mapping[str, Schedule]
  higher_is_better: Mapping[str, bool]
  best_metric: str | None
  fall_back: bool
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
    metric = self.best_metric
    if metric is not None and metric in metrics:
      value, best = metrics[metric], watch.best
      if monitor.is_better(value, best, self.higher_is_better[metric]):
        numbers = np.float32(value), np.int32(jax.device_get(state.round))
        value_, round_ = distributed.put(numbers, self.mesh, P())
        best = Best(value_, round_, self.copied(server))
        watch = watch._replace(best=best)
      elif self.fall_back and not ends and int(best.round) >= 0:
        server = self.copied(best.server)
    return state._replace(server=server, watch=watch)

  def _server_after(self, server: PyTree, metrics: Row) -> PyTree:
    """Return the server state after the algorithm has seen the metrics."""
    if self.algorithm.on_eval is None:
      return server
    if self.algorithm.privacy is not None:  # training clients are private
      metrics = {k: v for k, v in metrics.items() if not k.startswith("seen/")}
    server = self.algorithm.on_eval(server, metrics)
    # A copy of its own for every leaf, so that the state can be donated.
    server = jax.tree.map(
      lambda new, old: jnp.array(new, dtype=old.dtype, copy=True),
      server,
      self.shapes.server,
    )
    return distributed.put(server, self.mesh, self.spec.server)

  def _schedules_after(self, watch: Watch, metrics: Row) -> Watch:
    """Return what is monitored after schedules have seen the metrics."""
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
