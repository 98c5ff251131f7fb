"""Data sets and tasks that several experiments share.

Most runs of a study differ in numbers alone. Then they have the same data set,
which is loaded once, and the same task, so that their rounds are one program.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim.config.build.data import build_data
from fedjax_sim.config.build.task import build_task
from fedjax_sim.config.fields import resolved
from fedjax_sim.core import Aggregator, Algorithm, Task, Transform
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine.fingerprint import fingerprint
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training.optimizers import Optimizer

# Of these the field `hparams` is what a program gets as arguments.
TRACED = (Algorithm, Aggregator, Optimizer, Task, Transform)
_OF_TASK = ("compute_dtype", "frozen_dtype", "remat")  # in `runtime`


class Parts:
  """Data sets, tasks and simulators that were made, by what they come from."""

  def __init__(self) -> None:
    self._data: dict[str, FederatedDataset] = {}
    self._tasks: dict[tuple[int, str], Task] = {}
    self._measured: dict[Hashable, tuple[Task, Task]] = {}
    self._checked: dict[Hashable, Simulator] = {}  # which keeps ids from reuse

  def data(self, config: ConfigDict) -> FederatedDataset:
    """Return the data set of a complete config."""
    key = _text(config.data)
    if key not in self._data:
      self._data[key] = build_data(config)
    return self._data[key]

  def task(self, config: ConfigDict, data: FederatedDataset) -> Task:
    """Return the task of a complete config on a data set of this object."""
    runtime = {k: config.runtime[k] for k in _OF_TASK}
    key = id(data), _text(config.model, config.adapter, runtime)
    if key not in self._tasks:
      self._tasks[key] = build_task(config, data)
    return self._tasks[key]

  def measured(
    self, task: Task, measure: Callable[[Task], Task] | None
  ) -> Task:
    """Return the task with the metrics of an attack.

    Args:
      task: of this object.
      measure: `Attack.measure`.
    """
    if measure is None:
      return task
    key = id(task), fingerprint(measure)
    if key not in self._measured:  # kept with its own task, for its id
      self._measured[key] = task, measure(task)
    return self._measured[key][1]

  def check(self, simulator: Simulator) -> None:
    """Check a simulator, unless one of the same program was checked.

    Raises:
      DataError, ModelError, ValueError: as `Simulator.checked`.
    """
    program = program_of(simulator)
    if program not in self._checked:
      _ = simulator.checked
      self._checked[program] = simulator


def program_of(simulator: Simulator) -> Hashable:
  """Return a value that is equal for simulators whose rounds are one program.

  They differ in their seeds and in the values of numeric hyper-parameters, and
  may draw other cohorts of the same sizes. Valid as long as both are there.
  """
  s, release = simulator, simulator.algorithm.privacy
  # What schedules do after an evaluation is each run's own, on the host.
  schedules = {
    name: (schedule.factor, schedule.init, schedule.metric)
    for name, schedule in s.schedules.items()
    if isinstance(schedule, Schedule)
  }
  others = {k: v for k, v in s.schedules.items() if k not in schedules}
  return fingerprint(
    (
      s.algorithm._replace(privacy=None),
      release and (release.noise, release.checks_updates),
      s.effective_aggregator._replace(min_clients=1),
      tuple(s.transforms),
      (id(s.data), id(s.task)),
      (s.sampler.sizes, s.sampler.observe is None),
      (s.batching, s.runtime),
      (schedules, others),
      tuple(s.best_metrics),
      (s.revert_to_best, s.log_clients, s.debug, s.account.public_clients),
    ),
    traced=TRACED,
  )


def _text(*sections: Any) -> str:
  """Return sections as text, equal for equal values."""
  plain = [resolved(s) if isinstance(s, ConfigDict) else s for s in sections]
  return json.dumps(plain, sort_keys=True, default=repr)
