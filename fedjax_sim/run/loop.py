"""The rounds of a run: train, evaluate, log, save, and stop where asked."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from fedjax_sim.config import build
from fedjax_sim.distributed import processes
from fedjax_sim.engine.client_metrics import ClientMetrics
from fedjax_sim.engine.state import RunState
from fedjax_sim.run import client_states
from fedjax_sim.run.bucket.mirror import Mirror
from fedjax_sim.run.checkpoint import CheckpointError, Checkpoints
from fedjax_sim.run.profiling import Profile
from fedjax_sim.run.resume import Totals, account_facts, environment
from fedjax_sim.run.signals import Interrupted
from fedjax_sim.run.summary import rejection
from fedjax_sim.run.tracking import Journal
from fedjax_sim.simulation.dispatch import DispatchResult, Row
from fedjax_sim.simulation.evaluator import as_row
from fedjax_sim.simulation.lanes import Choice
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.simulation.timing import Phases


@dataclasses.dataclass(kw_only=True, eq=False)
class Loop:
  """A run between its first checkpoint and its summary.

  Attributes:
    experiment: what the config describes.
    simulator: what runs, with the lanes of `choice`.
    choice: number of lanes, and why.
    folder: the workdir.
    checkpoints: None in all processes but those that write, and where none
      shall be written.
    phases: measures what takes how long.
    data_digest: of the data, for checkpoints.
    journal: where metrics and messages go.
    received: signals so far.
    on_round: is told how many rounds are done.
    profile: traces a few dispatches; None if this process traces none.
    singles: number of first dispatches that have one round each.
    resumed: whether it goes on from a checkpoint.
    before: what was counted before this process went on.
    totals: what is counted so far.
    state: the state after `done` rounds.
    done: number of rounds done.
    timetables: those that the run has had, see `resume.with_timetable`.
    branched: whether it begins with a checkpoint of another run.
    mirror: copies the workdir after each checkpoint; None for no copy.
    ready: returns when what was compiled ahead is there.
    until: number of the round to stop after, before the run's end; None for
      the end.
    saved: number of rounds in the newest checkpoint.
    measured: set -> metrics of its clients, by the evaluation at the end; None
      if there was none here.
  """

  experiment: build.Experiment
  simulator: Simulator
  choice: Choice
  folder: Path
  checkpoints: Checkpoints | None
  phases: Phases
  data_digest: str
  journal: Journal
  received: list[int]
  on_round: Callable[[int], None]
  profile: Profile | None
  singles: int
  resumed: bool
  before: Totals
  state: RunState
  done: int
  timetables: list[dict[str, Any]]
  branched: bool = False
  mirror: Mirror | None = None
  ready: Callable[[], None] = lambda: None
  until: int | None = None
  totals: Totals = dataclasses.field(init=False)
  saved: int = dataclasses.field(init=False)
  measured: Mapping[str, ClientMetrics] | None = None

  def __post_init__(self) -> None:
    # A run that goes on has the lanes of its checkpoint; evaluations, too.
    if self.experiment.simulator is not self.simulator:
      own = dataclasses.replace(self.experiment, simulator=self.simulator)
      self.experiment = own
    self.totals = dataclasses.replace(self.before)
    self.saved = self.done
    if self.checkpoints is not None:
      self.checkpoints.on_commit = self._committed

  def run(self) -> None:
    """Run to the last round, or to `until`.

    Raises:
      Interrupted: SIGTERM or SIGINT, in any process; a checkpoint was written.
      DivergedError: a round left no finite update, or no finite model.
    """
    try:
      self._train()
    except BaseException:
      if self.checkpoints is not None:  # others are told of its commit
        with contextlib.suppress(CheckpointError):
          self.checkpoints.wait()
      raise
    self._wait_for_commit()

  def _train(self) -> None:
    timetable, profile = self.experiment.timetable, self.profile
    last = timetable.rounds if self.until is None else self.until
    self._announce()
    self._begin()
    sent: RunState | None = None
    with contextlib.closing(self._dispatches(last)) as dispatches:
      while self.done < last:
        self._end_if_signalled()
        if profile is not None:
          profile.before(last - self.done)
        out = dispatches.send(sent)
        if profile is not None:
          profile.after(out)
        self._count_rounds(out)
        seconds = self._evaluate_after(out)
        sent = self.state
        self._log(out, seconds)
        if out.failure is not None:
          raise out.failure
        if timetable.saved(self.done):
          self._save()
        self.on_round(self.done)

  def count(self) -> Totals:
    """Return what was counted until this moment."""
    seconds, earlier = self.phases.seconds(), self.before.phase_seconds
    self.totals.phase_seconds = {
      name: earlier.get(name, 0.0) + value for name, value in seconds.items()
    }
    self.totals.wall_seconds = self.before.wall_seconds + sum(seconds.values())
    compilations = self.simulator.compilations
    self.totals.compilations = self.before.compilations + compilations
    return self.totals

  def _announce(self) -> None:
    """Log how the run goes on."""
    if self.resumed:
      self.journal.log(f"Going on after round {self.done}.")
    elif not self.branched and build.INITIAL in self.experiment.sources:
      weights = self.experiment.sources[build.INITIAL]
      self.journal.log(f"Beginning with the weights of {weights}.")
    count, reason = self.choice
    lanes = "1 lane" if count == 1 else f"{count} lanes"
    self.journal.log(f"{lanes} a device: {reason}.")
    for slow in self.simulator.slow_layers:
      self.journal.log(f"Slow: {slow}.", level="warning")
    if self.experiment.budget_end:
      self.journal.log(f"The privacy budget {self.experiment.budget_end}.")

  def _begin(self) -> None:
    """Do what comes before the first dispatch."""
    if not self.resumed:
      self._save()
    with self.phases("compile"):
      self.ready()
    with self.phases("evaluate"):
      _ = self.simulator.evaluate.sets  # what is wrong with them shows now
    self.on_round(self.done)
    sets = self.experiment.timetable.evaluated(0) if self.done == 0 else []
    if sets:
      self.journal.begin({"round": 0, **self._evaluate(sets)})

  def _dispatches(
    self, last: int
  ) -> Generator[DispatchResult, RunState | None, None]:
    return self.simulator.run(
      self.state,
      last,
      stops=self.experiment.timetable.stops,
      phases=self.phases,
      singles=self.singles,
    )

  def _end_if_signalled(self) -> None:
    """End the run, with a checkpoint, if any process received a signal."""
    # A signal may reach one process alone, and all have to stop together.
    (number,) = processes.greatest(self.received[0] if self.received else 0)
    if not number:
      return
    if self.saved < self.done:
      self._save()
    self._wait_for_commit()
    raise Interrupted(int(number), self.done, self.folder)

  def _count_rounds(self, out: DispatchResult) -> None:
    self.done += len(out.rows)
    self.totals.add(out)
    self.state = out.state

  def _evaluate_after(self, out: DispatchResult) -> float:
    """Evaluate what is due after a dispatch; return the seconds it took."""
    began = time.perf_counter()
    sets = self.experiment.timetable.evaluated(self.done)
    if sets and out.failure is None:
      row = self._evaluate(sets)
      out.rows[-1].update(row)
      for metric in self.simulator.react.higher_is_better:
        if math.isnan(row.get(metric, 0.0)):
          self.journal.log(
            f"Round {self.done}: {metric} is NaN, which is no better value.",
            level="warning",
          )
    return time.perf_counter() - began

  def _evaluate(self, sets: list[str]) -> Row:
    """Evaluate the state, and let it react; return the metrics."""
    simulator = self.simulator
    ends = self.done == self.experiment.timetable.rounds
    with self.phases("evaluate"):
      measured = self.experiment.measure(self.state, sets)
      row = as_row(measured)
      self.state = simulator.react(self.state, row, ends=ends)
    if ends:
      self.measured = measured
    return row

  def _log(self, out: DispatchResult, eval_seconds: float) -> None:
    with self.phases("write"):
      self.journal.write(self.done, out, eval_seconds)
    if self.mirror is not None:
      for message, level in self.mirror.messages():
        self.journal.log(message, level=level)
    for round_, ids in out.rejected:
      self.journal.log(rejection(self.simulator, round_, ids), level="warning")

  def _save(self) -> None:
    """Begin to write a checkpoint of all that was done."""

    def write() -> None:
      if self.checkpoints is None:
        return
      self.journal.sync()
      client_states.commit(self.simulator, self.done, self.state)
      facts = {
        "lanes": self.choice,
        "totals": dataclasses.asdict(self.count()),
        "environment": environment(self.simulator),
        "data": self.data_digest,
        "sources": self.experiment.sources,
        "privacy": account_facts(self.simulator, self.done),
        "timetables": self.timetables,
      }
      self.checkpoints.save_later(self.done, fetched, facts)

    with self.phases("checkpoint"):
      states, ours = self.simulator.states, self._own_checkpoints()
      gather = self.checkpoints is None or not self.checkpoints.shared
      fetched = (states.to_host if gather else states.to_pieces)(self.state)
      processes.from_first(write)
      if ours is not None:
        ours.save_later(self.done, fetched, {})
    self.saved = self.done

  def _own_checkpoints(self) -> Checkpoints | None:
    """Return where a process writes its pieces that is not the first one."""
    return None if processes.is_first() else self.checkpoints

  def _wait_for_commit(self) -> None:
    """Return when the last checkpoint is committed."""

    def wait() -> None:
      if self.checkpoints is not None:
        self.checkpoints.wait()

    with self.phases("checkpoint"):
      processes.from_first(wait)
      if (ours := self._own_checkpoints()) is not None:
        ours.wait()

  def _committed(self, round_: int) -> None:
    """Let others have what a checkpoint holds."""
    self.journal.commit(round_)
    if self.checkpoints is not None:
      client_states.committed(self.simulator, round_, self.checkpoints)
    if self.mirror is not None:
      self.mirror.copy()
