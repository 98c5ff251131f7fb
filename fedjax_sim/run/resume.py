"""Resume a run: restore its state, and check that nothing else changed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data import StoredData
from fedjax_sim.distributed import processes
from fedjax_sim.run.checkpoint import Checkpoints, Restored, tree_digest
from fedjax_sim.run.workdir import ConfigChangedError
from fedjax_sim.simulation.dispatch import Dispatch
from fedjax_sim.simulation.simulator import Simulator


@dataclasses.dataclass(kw_only=True)
class Totals:
  """What a run has done so far; a resumed one goes on counting."""

  clients: int = 0
  useful: int = 0
  computed: int = 0
  idle: int = 0
  train_seconds: float = 0.0
  wall_seconds: float = 0.0
  compilations: int = 0
  phase_seconds: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, out: Dispatch) -> None:
    """Counts a dispatch."""
    self.clients += out.clients
    self.useful += out.waste.useful
    self.computed += out.waste.computed
    self.idle += out.waste.idle
    self.train_seconds += out.seconds

  @property
  def clients_per_second(self) -> float:
    """Clients trained a second, evaluation and planning not counted."""
    return self.clients / max(self.train_seconds, 1e-9)


def restore(
  checkpoints: Checkpoints | None, simulator: Simulator
) -> Restored | None:
  """The newest whole checkpoint, which process 0 reads, on all."""
  shapes = simulator.fetched_shapes
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

  def read() -> tuple[int, dict[str, Any]] | None:
    nonlocal state
    assert checkpoints is not None
    restored = checkpoints.restore(shapes, warn)
    if restored is None:
      return None
    state = restored.state
    return restored.round, restored.facts

  told = processes.from_first(read)
  if told is None:
    return None
  round_, facts = told
  return Restored(round_, processes.arrays_from_first(state), facts)


def versions() -> dict[str, str]:
  """Return the versions of what results depend on."""
  names = [
    *("fedjax_sim", "jax", "jaxlib", "flax", "optax", "numpy"),
    *("dp-accounting", "jax-privacy"),
  ]
  versions = {"python": platform.python_version()}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"  # run from a source tree
  return versions


def environment(simulator: Simulator) -> dict[str, str]:
  """What may change the last digits of a result."""
  devices = simulator.mesh.devices
  kind = devices.flat[0].device_kind
  if simulator.runtime.deterministic_reduction is None:
    kind = f"{devices.size} x {kind}"
  return {"devices": kind, **versions()}


def data_digest(simulator: Simulator) -> str:
  """Of what clients train on."""
  tables = dict(simulator.data.tables)
  return tree_digest(
    [
      np.frombuffer(bytes.fromhex(d.digest), np.uint8)
      if isinstance(d, StoredData)
      else (d.offsets, dict(d.examples))
      for d in simulator.data.all_splits.values()
    ]
    + [tables] * bool(tables)
  )


def refuse_other_data(before: str, now: str) -> None:
  """Refuse to go on with other training data."""
  if before != now:
    raise ConfigChangedError(
      "The training data are not those that the run began with; restore what"
      " data.path (or FEDJAX_SIM_DATA) named, or take another --workdir."
    )


def refuse_other_account(
  before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
  """Refuses to go on where rounds done would be counted as they were not."""
  told = lambda facts: {k: v for k, v in facts.items() if k != "epsilon"}
  if changed := validate.differences(told(before), told(now)):
    raise ConfigChangedError(
      "What the epsilon of the rounds done rests on is not what the run began"
      f" with: {'; '.join(changed)}. Restore your own sampler or algorithm, or,"
      " where noise was fitted, the libraries' versions; or take another"
      " --workdir."
    )


def account_facts(simulator: Simulator, done: int) -> dict[str, Any]:
  """The account of so many rounds; empty without privacy."""
  return {} if simulator.ledger is None else simulator.ledger.facts(done)


def warn_of_changes(
  before: Mapping[str, str],
  now: Mapping[str, str],
  effect: str = "Results may differ in the last digits",
) -> None:
  """Warn of what has changed since the checkpoint."""
  changed = validate.differences(before, now)
  if changed:
    warn(f"Since the checkpoint there changed: {'; '.join(changed)}. {effect}.")


def warn(message: str) -> None:
  """Print a warning to stderr."""
  print(message, file=sys.stderr)  # noqa: T201
