"""What evaluations leave in a run's state: rates on a plateau, best models.

It is part of the state, so a run that is resumed goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import PyTree, Task, validate
from fedjax_sim.core.metric_names import SPREADS
from fedjax_sim.engine.hparams import Schedule, reacted
from fedjax_sim.engine.state import Best, MonitorState

_SETS = {  # prefix -> what gives such metrics
  "test": "the data have no central test set",
  "seen": "set data.heldout_fraction",
  "unseen": "set data.unseen_clients",
}


def first(
  schedules: Mapping[str, Schedule],
  server: PyTree,
  best_metrics: Sequence[str],
) -> MonitorState:
  """Return the monitored state before any evaluation.

  Args:
    schedules: hyper-parameter -> its schedule.
    server: a server state.
    best_metrics: metrics, of each of which the best model is kept.
  """
  zeros = jax.tree.map(jnp.zeros_like, server)
  none = Best(jnp.float32(jnp.nan), jnp.int32(-1), zeros)
  return MonitorState(
    schedules={name: s.init() for name, s in schedules.items()},
    best=dict.fromkeys(best_metrics, none),
  )


def after(
  states: Mapping[str, PyTree],
  schedules: Mapping[str, Schedule],
  metrics: Mapping[str, float],
  higher_is_better: Mapping[str, bool],
) -> dict[str, PyTree]:
  """Return the schedules' states after an evaluation; on the host.

  Args:
    states: hyper-parameter -> its schedule's state.
    schedules: hyper-parameter -> its schedule.
    metrics: what the evaluation measured; what is missing changes nothing.
    higher_is_better: of every metric.
  """
  new = dict(states)
  for name, schedule in schedules.items():
    metric = schedule.metric
    if metric is not None and metric in metrics:
      higher = higher_is_better[metric]
      new[name] = reacted(schedule, states[name], metrics[metric], higher)
  return new


def is_better(value: float, best: Best, higher_is_better: bool) -> bool:
  """Return whether a value is better than the best one; NaN never is."""
  if np.isnan(value) or int(best.round) < 0:
    return not np.isnan(value)
  one, other = np.float32(value), np.float32(best.value)
  return bool(one > other if higher_is_better else one < other)


def followed(
  schedules: Mapping[str, Schedule], best_metrics: Sequence[str]
) -> dict[str, str]:
  """Return the metrics that decide on the run: who follows one -> the metric.

  Args:
    schedules: hyper-parameter -> its schedule.
    best_metrics: metrics, of each of which the best model is kept.
  """
  result = {
    f"schedule of {name}: metric": schedule.metric
    for name, schedule in schedules.items()
    if schedule.metric is not None
  }
  for i, metric in enumerate(best_metrics):
    result[f"server.best_metrics[{i}]"] = metric
  return result


def directions(
  wanted: Mapping[str, str], names: Mapping[str, str], task: Task
) -> dict[str, bool]:
  """Return for every metric that is followed whether higher is better.

  Args:
    wanted: who follows one, as `followed` returns it.
    names: what an evaluation measures -> the task's metric that it is of.
    task: what is evaluated.

  Raises:
    ValueError: a metric is not evaluated, or the task does not say.
  """
  result = {}
  for owner, metric in wanted.items():
    part = metric.partition("/")[0]
    if part in _SETS and not any(name.startswith(f"{part}/") for name in names):
      raise ValueError(f"{owner}={metric!r} is not evaluated; {_SETS[part]}.")
    validate.one_of(owner, metric, names)
    if metric.rpartition("/")[2] in SPREADS:
      result[metric] = False
      continue
    base = names[metric]
    if base not in task.higher_is_better:
      raise ValueError(
        f"{owner}={metric!r}: whether more of {base!r} is better is not known;"
        f" say {base}.higher_is_better = True of a function of your own, or"
        f" Task.higher_is_better={{{base!r}: True}}."
      )
    result[metric] = task.higher_is_better[base]
  return result
