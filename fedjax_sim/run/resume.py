"""Resume a run: restore its state, and check that nothing else changed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.config.build import INITIAL, Experiment, Timetable
from fedjax_sim.core import urls, validate
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.data import StoredData
from fedjax_sim.distributed import processes
from fedjax_sim.engine.state import RunState
from fedjax_sim.run import client_states
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.checkpoint_reader import Restored
from fedjax_sim.run.workdir import ConfigChangedError
from fedjax_sim.simulation.dispatch import DispatchResult
from fedjax_sim.simulation.lanes import Choice
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.simulation.timing import Phases

_ACCOUNTANTS = ("dp-accounting", "jax-privacy")  # of private runs alone


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

  def add(self, out: DispatchResult) -> None:
    """Count a dispatch."""
    self.clients += out.clients
    self.useful += out.waste.useful
    self.computed += out.waste.computed
    self.idle += out.waste.idle
    self.train_seconds += out.seconds

  @property
  def clients_per_second(self) -> float:
    """Clients trained a second, evaluation and planning not counted."""
    return self.clients / max(self.train_seconds, 1e-9)


class Begun(NamedTuple):
  """Where a run begins, or goes on.

  Attributes:
    simulator: what runs, with the lanes of `choice`.
    choice: number of lanes, and why.
    resumed: whether a checkpoint was there.
    before: what was counted before.
    state: the state after `done` rounds.
    done: number of rounds done.
    timetables: see `with_timetable`.
    branched: whether it begins with a checkpoint of another run.
  """

  simulator: Simulator
  choice: Choice
  resumed: bool
  before: Totals
  state: RunState
  done: int
  timetables: list[dict[str, Any]]
  branched: bool = False


def begin(
  experiment: Experiment,
  checkpoints: Checkpoints | None,
  phases: Phases,
  data_digest: str,
  branch: Callable[[RunState], RunState] | None = None,
  ahead: Callable[[Simulator], None] = lambda simulator: None,
) -> Begun:
  """Restore a run from its newest whole checkpoint, or begin it.

  Args:
    experiment: what the config describes.
    checkpoints: None in all processes but those that write.
    phases: measures what takes how long.
    data_digest: of the data.
    branch: the state before the first round -> that which a branch begins with,
      both on the host; called by all processes, and what the first one returns
      counts. None for no branch.
    ahead: begins to compile what the run needs, once its lanes are known.

  Raises:
    ConfigChangedError: the checkpoint is of other data, or of an account that
      counted otherwise.
  """
  simulator = experiment.simulator
  with phases("checkpoint"):
    restored = restore(checkpoints, simulator)
  if restored is None:
    measured = simulator.runtime.lanes == "auto"
    with phases("build"):
      if not measured:
        ahead(simulator)
      state = simulator.init()
      if branch is not None:
        state = branched(simulator, state, branch)
    done = int(jax.device_get(state.round))
    rounds = experiment.timetable.rounds - done
    choice = simulator.choose_lanes(rounds, phases)
    if measured:  # not before: the machine is to do nothing else
      ahead(simulator)
    timetables = with_timetable([], done, experiment.timetable)
    return Begun(
      simulator,
      choice,
      False,
      Totals(),
      state,
      done,
      timetables,
      branched=branch is not None,
    )
  begun = going_on(experiment, restored, data_digest)
  if begun.done < experiment.timetable.rounds:
    ahead(begun.simulator)
  if checkpoints is not None:
    with phases("checkpoint"):
      client_states.pin_checkpoints(begun.simulator, checkpoints)
  if processes.is_first():
    facts = restored.facts
    warn_of_changes(facts["environment"], environment(begun.simulator))
    began = dict(facts.get("sources", {}))  # old checkpoints had none
    sources = dict(experiment.sources)
    warn_of_changes(
      {INITIAL: began.pop(INITIAL, "none")},
      {INITIAL: sources.pop(INITIAL, "none")},
      "The run keeps the weights that it began with",
    )
    warn_of_changes(began, sources, "The rounds to come follow the new code")
    warn_of_changes(
      facts.get("privacy", {}),
      account_facts(begun.simulator, begun.done),
      "The accountant's libraries are other ones; both epsilons are bounds",
    )
  return begun


def branched(
  simulator: Simulator, state: RunState, branch: Callable[[RunState], RunState]
) -> RunState:
  """Return the state that a branch begins with, on all processes.

  Args:
    simulator: of the branch.
    state: before its first round; used up.
    branch: as in `begin`.
  """
  begun = branch(simulator.states.to_host(state))
  return simulator.states.to_devices(processes.arrays_from_first(begun))


def going_on(
  experiment: Experiment,
  restored: Restored,
  data_digest: str,
  copied_from: Path | None = None,
) -> Begun:
  """Return where a run goes on from a checkpoint.

  Args:
    experiment: what the config describes.
    restored: the checkpoint.
    data_digest: of the data.
    copied_from: the workdir of the run, to copy client states on the disk from
      there; None to go on with its own.

  Raises:
    ConfigChangedError: the checkpoint is of other data, or of an account that
      counted otherwise.
  """
  simulator = experiment.simulator
  done, facts = restored.round, restored.facts
  refuse_other_data(facts["data"], data_digest)
  refuse_other_account(facts.get("privacy", {}), account_facts(simulator, done))
  # The lanes were measured when the run began; its float sums follow them.
  choice = Choice(*facts["lanes"])
  if choice.lanes != simulator.runtime.lanes:
    runtime = dataclasses.replace(simulator.runtime, lanes=choice.lanes)
    simulator = dataclasses.replace(simulator, runtime=runtime)
  state = restored.state
  if copied_from is not None:
    state = client_states.copied(simulator, state, copied_from)
  state = simulator.states.to_devices(state)
  timetable, earlier = experiment.timetable, facts.get("timetables", [])
  ended = has_ended(facts, done)
  if ended and done < timetable.rounds:  # it was given more rounds
    state = simulator.react.continued(state)
  if earlier and not ended and done == timetable.rounds:
    raise ConfigChangedError(
      f"server.rounds={done}: the run has done {done} rounds and was not"
      " evaluated as at its end; give more."
    )
  before = Totals(**facts["totals"])
  timetables = with_timetable(earlier, done, timetable)
  return Begun(simulator, choice, True, before, state, done, timetables)


def has_ended(facts: Mapping[str, Any], done: int) -> bool:
  """Return whether a run had no round left; False where it is not known.

  Args:
    facts: of its checkpoint.
    done: rounds of the checkpoint.
  """
  timetables = facts.get("timetables", [])
  return bool(timetables) and timetables[-1]["rounds"] == done


def with_timetable(
  earlier: Sequence[Mapping[str, Any]], done: int, timetable: Timetable
) -> list[dict[str, Any]]:
  """Return the timetables that a run has had, each with where it `begins`.

  Args:
    earlier: those before.
    done: rounds done.
    timetable: of the rounds to come.
  """
  kept = [dict(entry) for entry in earlier if entry["begins"] < done]
  now = {"begins": done, **dataclasses.asdict(timetable)}
  if kept and {**kept[-1], "begins": done} == now:
    return kept
  return [*kept, now]


def restore(
  checkpoints: Checkpoints | None, simulator: Simulator
) -> Restored | None:
  """Return the newest whole checkpoint.

  The first process reads it; where all write, each reads what it needs.
  """
  shapes = simulator.states.host_shapes
  if checkpoints is not None and checkpoints.shared:
    ranges = jax.tree.leaves(simulator.states.ranges())
    return checkpoints.restore(shapes, warn, ranges)
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
    *_ACCOUNTANTS,
  ]
  versions = {"python": platform.python_version()}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"  # run from a source tree
  return versions


def environment(simulator: Simulator) -> dict[str, str]:
  """Return what may change the last digits of a result."""
  devices = simulator.mesh.devices
  kind = devices.flat[0].device_kind
  if simulator.runtime.deterministic_reduction is None:
    kind = f"{devices.size} x {kind}"
  found = versions()
  if simulator.account.ledger is None:
    found = {k: v for k, v in found.items() if k not in _ACCOUNTANTS}
  return {"devices": kind, **found}


def data_digest(simulator: Simulator) -> str:
  """Return the SHA-256 of what clients train on."""
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
  """Refuse to go on where rounds done would be counted as they were not."""
  told = lambda facts: {k: v for k, v in facts.items() if k != "epsilon"}
  if changed := validate.differences(told(before), told(now)):
    raise ConfigChangedError(
      "What the epsilon of the rounds done rests on is not what the run began"
      f" with: {'; '.join(changed)}. Restore your own sampler or algorithm, or,"
      " where noise was fitted, the libraries' versions; or take another"
      " --workdir."
    )


def account_facts(simulator: Simulator, done: int) -> dict[str, Any]:
  """Return the account of so many rounds; empty without privacy."""
  ledger = simulator.account.ledger
  return {} if ledger is None else ledger.facts(done)


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
  """Print a warning to stderr; passwords in URLs are left out."""
  print(urls.redacted(message), file=sys.stderr)  # noqa: T201
