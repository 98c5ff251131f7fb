"""Train the runs of a program: chunk after chunk, round after round.

A chunk is as many runs as fit into memory. Its runs do the same rounds; which
runs share a chunk, and where each stands in it, does not depend on when a study
was interrupted, so that it goes on with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from fedjax_sim.core import PyTree
from fedjax_sim.core.tree import nbytes
from fedjax_sim.distributed import jax_internals, memory
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.reporting import MetricsFile, Progress
from fedjax_sim.run.resume import environment, warn, warn_of_changes
from fedjax_sim.run.workdir import WorkdirError
from fedjax_sim.simulation.dispatch import PlannedRounds, Row, read_metrics
from fedjax_sim.simulation.evaluator import as_row
from fedjax_sim.simulation.planner import rounds_per_dispatch
from fedjax_sim.simulation.state import noise_words
from fedjax_sim.studies.folder import StudyFolder
from fedjax_sim.studies.layout import Layout, lay_out
from fedjax_sim.studies.program import StudyProgram, stack, widest
from fedjax_sim.studies.runs import StudyError, StudyRun, plan_key

_LONG = 0.5  # seconds of a round


@dataclasses.dataclass(kw_only=True, eq=False)
class Trainer:
  """The runs of one program, and their states.

  Attributes:
    number: of the program.
    runs: all of its runs.
    program: compiles and calls it.
    folder: of the study.
    received: signals so far, each of which ends the study.
    data: digest of the training data.
    state: of all runs, on the host, leaves (runs, ...).
    chunk: the most runs at once; `fit` lowers it to what memory holds.
    saves: checkpoints that were written.
    seconds: of all runs together, while they trained.
  """

  number: int
  runs: Sequence[StudyRun]
  program: StudyProgram
  folder: StudyFolder
  received: Sequence[int]
  data: str
  state: RunState
  chunk: int = 0
  saves: int = 0
  seconds: float = 0.0

  _told: list[tuple[int, str]] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    self.chunk = self.chunk or len(self.runs)

  @property
  def facts(self) -> dict[str, Any]:
    """What a checkpoint says besides how far the runs are."""
    return {
      "data": self.data,
      "chunk": self.chunk,
      "environment": {
        **environment(self.program.simulator),
        "devices of the study": str(self.program.devices),
      },
      "sources": {k: v for run in self.runs for k, v in run.sources.items()},
    }

  def restore(self) -> None:
    """Go on from the newest checkpoint, if there is one.

    Raises:
      WorkdirError: it is of other data, or of other runs.
    """
    found = self.folder.restore(self.number, self.state, self.runs)
    if found is None:
      return
    self.saves, self.state = found.round, jax.tree.map(np.array, found.state)
    facts = self.facts
    if found.facts["data"] != self.data:
      raise WorkdirError(
        f"--studydir={self.folder.path}: the training data are not those that"
        " the study began with; restore them, or name another folder."
      )
    self.chunk = found.facts["chunk"]
    self._told = [(run.done, run.status) for run in self.runs]
    warn_of_changes(found.facts["environment"], facts["environment"])
    warn_of_changes(
      found.facts["sources"],
      facts["sources"],
      "The rounds to come follow the new code; runs keep the weights that they"
      " began with",
    )
    for run in self.runs:
      self.folder.metrics(run).close()  # cut back, also of those that ended

  def fit(self) -> None:
    """Compile for all runs, or for as many at once as memory holds.

    Raises:
      StudyError: a single run does not fit.
    """
    device = jax.local_devices()[0]
    limit = memory.memory_limit(device)
    before = self.chunk
    while True:
      nbytes = self.program.device_bytes(self.places)
      if nbytes <= limit:
        break
      if self.chunk == 1:
        raise StudyError(
          f"{self.runs[0]} takes {nbytes / 1e9:.1f} GB of a device, which has"
          f" {limit / 1e9:.1f}; make the model or client.batch_size smaller."
        )
      self.chunk = -(-self.chunk // 2)
    if self.saves and self.chunk < before:
      warn(
        f"Memory holds {self.chunk} runs at once, and held {before}: results"
        " may differ in the last digits."
      )
    for chunk in self.chunks(self.runs)[1:]:  # the last may be smaller
      self.program.compiled(self.layout(chunk).place.shape)

  @property
  def places(self) -> tuple[int, ...]:
    """Devices, groups and rows of the first chunk."""
    return self.layout(self.chunks(self.runs)[0]).place.shape

  def predicted(self) -> tuple[float, int, int]:
    """Return seconds a round of all runs, bytes a device, and chunks.

    The seconds are measured: a round of the first chunk is run and forgotten.
    """
    chunks = self.chunks(self.runs)
    seconds = _Chunk(self, chunks[0], 1).probe()
    nbytes = self.program.device_bytes(self.places)
    return seconds * len(chunks), nbytes, len(chunks)

  def chunks(self, runs: Sequence[StudyRun]) -> list[list[int]]:
    """Return the positions of runs in each chunk."""
    names = {run.name for run in runs}
    where = [i for i, run in enumerate(self.runs) if run.name in names]
    return [where[i : i + self.chunk] for i in range(0, len(where), self.chunk)]

  def layout(self, chunk: Sequence[int]) -> Layout:
    """Return where the runs of a chunk stand."""
    plans = [plan_key(self.runs[i]) for i in chunk]
    return lay_out(plans, self.program.devices, self._widest)

  @functools.cached_property
  def _widest(self) -> int:
    return widest(self.program.simulator)

  def train(self, since: int, until: int) -> None:
    """Train the runs that go on until a round, or their own last one.

    Args:
      since: the round up to which they were trained before.
      until: number of the round.
    """
    active = [run for run in self.runs if _began(run, since)]
    for chunk in self.chunks(active):
      if any(
        run.goes_on and run.done < min(until, run.rounds)
        for run in (self.runs[i] for i in chunk)
      ):
        began = time.perf_counter()
        _Chunk(self, chunk, until).train()
        self.seconds += time.perf_counter() - began
        self.save()

  def save(self) -> None:
    """Begin to write a checkpoint of all runs, unless none has changed."""
    told = [(run.done, run.status) for run in self.runs]
    if told == self._told:
      return
    self._told = told
    self.saves += 1
    self.folder.save(self.number, self.saves, self.state, self.runs, self.facts)

  def own_state(self, run: StudyRun) -> RunState:
    """Return the state of a run, on the host."""
    i = self.runs.index(run)
    state: RunState = jax.tree.map(lambda x: x[i], self.state)
    return state


def _began(run: StudyRun, since: int) -> bool:
  """Return whether a run had rounds to do after round `since`.

  Those that have ended in the meantime count: places do not move when a study
  goes on after a kill.
  """
  if run.status == "diverged":
    return run.done >= since
  return run.goes_on or (run.status == "finished" and run.done > since)


class _Chunk:
  """Runs that are trained together, while they are."""

  def __init__(self, trainer: Trainer, chunk: Sequence[int], until: int):
    self._trainer, self._chunk, self._until = trainer, list(chunk), until
    self._program, self._folder = trainer.program, trainer.folder
    self._runs = [trainer.runs[i] for i in chunk]
    self._layout = trainer.layout(chunk)
    rows: RunState = jax.tree.map(lambda x: x[self._chunk], trainer.state)
    self._state = self._program.put(self._layout.pack(rows))
    numbers = [run.simulator.states.traced() for run in self._runs]
    self._hparams = self._program.put(self._layout.pack(stack(numbers)))
    self._files: list[MetricsFile] = []
    self._progress = Progress(0)

  @property
  def _active(self) -> list[tuple[int, StudyRun]]:
    """The runs that go on, with their positions in the chunk."""
    return [
      (i, run)
      for i, run in enumerate(self._runs)
      if run.goes_on and run.done < min(self._until, run.rounds)
    ]

  def probe(self) -> float:
    """Return the seconds of a round of the runs, which is forgotten."""
    active = self._runs[0]
    simulators = [run.simulator for run in self._runs]
    planned = self._program.plan(self._layout, simulators, active.done, 1)
    seconds = 0.0
    for _ in range(2):  # the first call loads the program
      if seconds > _LONG:  # of which loading is a small part
        break
      began = time.perf_counter()
      self._state, _ = self._program.call(
        self._layout, self._state, self._hparams, planned
      )
      seconds = time.perf_counter() - began
    return seconds

  def train(self) -> None:
    """Run until the last of the runs has done its rounds."""
    with contextlib.ExitStack() as stack:
      self._files = [
        stack.enter_context(self._folder.metrics(run)) for run in self._runs
      ]
      self._progress = stack.enter_context(self._bar())
      for run in self._runs:
        if run.status == "waiting":
          run.status = "running"
      self._begin()
      stack.callback(self._store)
      with contextlib.closing(self._planned()) as rounds:
        for planned in rounds:
          if self._trainer.received:
            self._save()
            self._folder.wait()
            raise self._folder.interrupted(self._trainer.received[0])
          self._dispatch(planned)

  def _bar(self) -> Progress:
    """Return the bar of the rounds of all runs."""
    return Progress(
      min(self._until, max(run.rounds for run in self._runs)),
      done=min(run.done for _, run in self._active),
    )

  def _begin(self) -> None:
    """Evaluate before the first round, where that is asked for."""
    active = self._active
    timetable = active[0][1].experiment.timetable
    sets = timetable.evaluated(0) if active[0][1].done == 0 else []
    if sets:
      for i, row in self._evaluate({i: sets for i, _ in active}).items():
        self._files[i].append([{"round": 0, **row}])

  def _planned(self) -> Generator[list[list[PlannedRounds]], None, None]:
    """Yield rounds, laid out while the devices work on those before them."""
    seconds = math.inf
    settings = jax_internals.settings_of_thread()
    simulators = [run.simulator for run in self._runs]
    timetable = self._runs[0].experiment.timetable
    fixed = self._program.simulator.runtime.rounds_per_dispatch

    def plan(done: int, last: int, pace: float) -> list[list[PlannedRounds]]:
      most = rounds_per_dispatch(fixed, pace, done, last, timetable.stops)
      with settings():
        return self._program.plan(self._layout, simulators, done, most)

    with ThreadPoolExecutor(1, "plan") as pool:
      done = self._active[0][1].done
      last = self._last()
      pending = pool.submit(plan, done, last, seconds)
      while True:
        planned = pending.result()
        done += planned[0][0].num_rounds
        if done < last:
          pending = pool.submit(plan, done, last, seconds)
        began = time.perf_counter()
        yield planned
        seconds = (time.perf_counter() - began) / planned[0][0].num_rounds
        if not self._active:
          return
        if done >= last:  # of the runs with the fewest rounds
          last = self._last()
          pending = pool.submit(plan, done, last, seconds)

  def _last(self) -> int:
    """Return the round at which the next run of the chunk ends."""
    return min(min(self._until, run.rounds) for _, run in self._active)

  def _dispatch(self, planned: list[list[PlannedRounds]]) -> None:
    """Run planned rounds, evaluate what is due, and write what is known."""
    began, active = time.perf_counter(), self._active
    for _, run in active:
      last = run.done + planned[0][0].num_rounds
      run.simulator.account.check_round(last)
    self._state, metrics = self._program.call(
      self._layout, self._state, self._hparams, planned
    )
    rows = {i: self._read(i, run, metrics, planned) for i, run in active}
    active = [(i, run) for i, run in active if run.status == "running"]
    due = {i: run.experiment.timetable.evaluated(run.done) for i, run in active}
    for i, row in self._evaluate({i: s for i, s in due.items() if s}).items():
      rows[i][-1].update(row)
    for i, found in rows.items():
      self._files[i].append(found)
    self._show(rows, time.perf_counter() - began)
    for _, run in active:
      if run.done == run.rounds:
        run.status = "finished"
    if not self._active:
      return  # and the caller saves
    done = max(run.done for _, run in self._active)
    if self._runs[0].experiment.timetable.saved(done):
      self._save()
    elif any(not run.goes_on for _, run in active):
      self._store()  # before their places do more rounds

  def _show(self, rows: dict[int, list[Row]], seconds: float) -> None:
    """Show the runs' mean progress."""
    last = [found[-1] for found in rows.values() if found]
    if last:
      shown = ("train/loss", "test/accuracy")
      mean: Row = {
        key: float(np.mean([row[key] for row in last]))
        for key in shown
        if all(key in row for row in last)
      }
      clients = sum(row["clients"] for found in rows.values() for row in found)
      rate = clients / max(seconds, 1e-9)
      done = max(int(row["round"]) for row in last)
      self._progress.update({"round": done, **mean}, clients_per_second=rate)

  def _save(self) -> None:
    """Write a checkpoint, after the rows of the rounds that it holds."""
    for file in self._files:
      file.sync()
    self._store()
    self._trainer.save()

  def _read(
    self,
    i: int,
    run: StudyRun,
    metrics: RoundMetrics,
    planned: list[list[PlannedRounds]],
  ) -> list[Row]:
    """Return the rows of a run's rounds, up to one at which it diverges."""
    device, group, _ = self._layout.at(i)
    own: RoundMetrics = jax.tree.map(lambda x: x[i], metrics)
    simulator = self._program.simulator
    names = [t.name for t in simulator.transforms]
    traffic = simulator.traffic
    read = read_metrics(own, planned[device][group], traffic, names)
    for row in read.rows:
      row |= run.simulator.account.epsilon_row(int(row["round"]))
    run.done += len(read.rows)
    if read.failure is not None:
      run.status, run.reason = "diverged", str(read.failure)
    return read.rows

  def _evaluate(self, due: dict[int, list[str]]) -> dict[int, Row]:
    """Evaluate runs, and let their states react.

    Args:
      due: position of a run -> the sets to evaluate.
    """
    if not due:
      return {}
    names = {name for sets in due.values() for name in sets}
    measured = self._program.evaluate(self._layout, self._state, names)
    found: dict[int, Row] = {}
    for i, sets in due.items():
      wanted = {k: v for k, v in measured[i].items() if k in sets}
      found[i] = as_row(wanted)
    self._react(found)
    return found

  def _react(self, rows: dict[int, Row]) -> None:
    """Let states react to their evaluations, on the host."""
    react = self._program.simulator.react
    if not react.followers and not react.best_metrics:
      return
    stacked = self._layout.unpack(jax.device_get(self._state))
    states = self._program.simulator.states
    for i, row in rows.items():
      run = self._runs[i]
      own = states.to_devices(jax.tree.map(lambda x, i=i: x[i], stacked))
      ends = run.done == run.rounds
      after = states.to_host(run.simulator.react(own, row, ends=ends))
      jax.tree.map(lambda x, new, i=i: x.__setitem__(i, new), stacked, after)
    self._state = self._program.put(self._layout.pack(stacked))

  def _store(self) -> None:
    """Copy the states of the chunk's runs to those of all runs.

    A place goes on until the last of its chunk is done; of a run that is, only
    the state after its last round counts, and of one that diverged that of the
    checkpoint before.
    """
    mine: RunState = self._layout.unpack(jax.device_get(self._state))
    counts = [
      i
      for i, run in enumerate(self._runs)
      if run.status != "diverged" and int(mine.round[i]) == run.done
    ]
    where = [self._chunk[i] for i in counts]

    def put(x: np.ndarray, new: np.ndarray) -> None:
      x[where] = new[counts]

    jax.tree.map(put, self._trainer.state, mine)


def first_states(runs: Sequence[StudyRun]) -> RunState:
  """Return the states of runs of one program before the first round.

  Returns:
    On the host, leaves (runs, ...).

  Raises:
    StudyError: there is no room for them.
  """
  states = [run.simulator.states for run in runs]
  # While a checkpoint is written there is a second copy.
  needed = 2 * len(runs) * nbytes(states[0].host_shapes)
  room = memory.available_memory()
  if needed > room:
    raise StudyError(
      f"The states of {len(runs)} runs take {needed / 1e9:.1f} GB of the host's"
      f" memory, which has {room / 1e9:.1f}; vary fewer values at once."
    )
  seeds = np.array([run.seed for run in runs], np.uint32)
  words = [noise_words(s.noise_seed, s.draws_noise) for s in states]
  numbers: PyTree = stack([s.traced() for s in states])
  made = states[0].stacked(seeds, np.stack(words), numbers)
  writable: Any = jax.tree.map(np.array, made)
  return RunState(*writable)
