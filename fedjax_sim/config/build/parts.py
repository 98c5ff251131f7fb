"""Data sets and tasks that several experiments share.

Most runs of a study differ in numbers alone. Then they have the same data set,
which is loaded once, and the same task, so that their rounds are one program.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim.config.build.data import build_data
from fedjax_sim.config.build.task import build_task
from fedjax_sim.config.fields import resolved
from fedjax_sim.core import Task
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine.fingerprint import fingerprint
from fedjax_sim.simulation.simulator import Simulator

_OF_TASK = ("compute_dtype", "frozen_dtype", "remat")  # in `runtime`


class Parts:
  """Data sets, tasks and simulators that were made, by what they come from."""

  def __init__(self) -> None:
    self._data: dict[str, FederatedDataset] = {}
    self._tasks: dict[tuple[int, str], Task] = {}
    self._checked: list[Simulator] = []

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

  def check(self, simulator: Simulator) -> None:
    """Check a simulator, unless one of the same program was checked.

    Raises:
      DataError, ModelError, ValueError: as `Simulator.checked`.
    """
    checked = {program_of(other) for other in self._checked}
    if not checked or program_of(simulator) not in checked:
      _ = simulator.checked
      self._checked.append(simulator)


def program_of(simulator: Simulator) -> Hashable:
  """Return a value that is equal for simulators whose rounds are one program.

  They differ in their seeds and in the values of numeric hyper-parameters, and
  may draw other cohorts of the same sizes.
  """
  s, release = simulator, simulator.algorithm.privacy
  return fingerprint(
    (
      s.algorithm._replace(privacy=None),
      release and (release.noise, release.checks_updates),
      s.effective_aggregator,
      tuple(s.transforms),
      id(s.data),
      id(s.task),
      s.sampler.sizes,
      s.sampler.observe is None,
      s.batching,
      s.runtime,
      dict(s.schedules),
      tuple(s.best_metrics),
      (s.revert_to_best, s.log_clients, s.debug, s.account.public_clients),
    )
  )


def _text(*sections: Any) -> str:
  """Return sections as text, equal for equal values."""
  plain = [resolved(s) if isinstance(s, ConfigDict) else s for s in sections]
  return json.dumps(plain, sort_keys=True, default=repr)
