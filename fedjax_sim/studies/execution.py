"""Execute the runs of a study, program after program."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedjax_sim import distributed
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.distributed import jax_internals
from fedjax_sim.reporting import read_metrics, write_json
from fedjax_sim.run import experiment
from fedjax_sim.run.resume import data_digest, versions
from fedjax_sim.run.summary import result_facts
from fedjax_sim.simulation.dispatch import DivergedError
from fedjax_sim.studies.folder import StudyFolder
from fedjax_sim.studies.program import StudyProgram
from fedjax_sim.studies.runs import StudyRun, refusal
from fedjax_sim.studies.training import Trainer, first_states

# So many at once: a process has room for some ten thousand pieces of code, and
# a program on a CPU takes hundreds.
MOST_COMPILED = 32


class Plan:
  """The programs of a study, and the runs that go one by one.

  Of more than `MOST_COMPILED` programs so many are compiled at a time, trained,
  and given up for the next ones.

  Args:
    runs: all runs.
    folder: of the study.
    received: signals so far, each of which ends the study.
  """

  def __init__(
    self,
    runs: Sequence[StudyRun],
    folder: StudyFolder,
    received: Sequence[int],
  ):
    self._runs, self._folder = runs, folder
    members: dict[int, list[StudyRun]] = {}
    for run in runs:
      members.setdefault(run.program, []).append(run)
    self._alone: list[tuple[str, list[StudyRun]]] = []
    self._trainers: list[Trainer] = []
    for number, own in members.items():
      why = refusal(own[0].experiment)
      if why:
        self._alone.append((why, own))
        continue
      program = StudyProgram(
        own[0].simulator, distributed.devices(), own[0].config.runtime.lanes
      )
      self._trainers.append(
        Trainer(
          number=number,
          runs=own,
          program=program,
          folder=folder,
          received=received,
          data=data_digest(own[0].simulator),
          state=first_states(own),
        )
      )
    self._compile_seconds = 0.0

  def restore(self) -> None:
    """Go on from the newest checkpoints."""
    for trainer in self._trainers:
      trainer.restore()

  def compile(self) -> None:
    """Compile the first programs, which mostly are all."""
    began = time.perf_counter()
    self._fit(self._batches[0] if self._batches else [])
    self._compile_seconds = time.perf_counter() - began

  @property
  def _batches(self) -> list[list[Trainer]]:
    """The programs that are compiled at the same time."""
    firsts = range(0, len(self._trainers), MOST_COMPILED)
    return [self._trainers[i : i + MOST_COMPILED] for i in firsts]

  def _fit(self, trainers: Sequence[Trainer]) -> None:
    """Compile programs, in parallel."""
    settings = jax_internals.settings_of_thread()

    def fit(trainer: Trainer) -> None:
      with settings():
        trainer.fit()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(fit, trainers))

  def predicted(self, rungs: Sequence[int]) -> str:
    """Return memory and time of what `compile` compiled, in words.

    Args:
      rungs: rounds after which runs may end, and the last round.
    """
    first, *later = self._batches or [[]]
    lines = []
    total = 0.0
    for trainer in first:
      seconds, nbytes, chunks = trainer.predicted()
      total += seconds * max(run.rounds - run.done for run in trainer.runs)
      devices, groups, rows = trainer.places
      lines.append(
        f"  program {trainer.number}: {counted(len(trainer.runs), 'run')} in"
        f" {counted(chunks, 'chunk')} of {counted(devices, 'device')} x"
        f" {counted(groups, 'group')} x {counted(rows, 'row')},"
        f" {nbytes / 1e6:.0f} MB a device, {seconds:.3g} s a round of all"
      )
    if lines:
      programs = counted(len(first), "program")
      lines.insert(0, f"{programs}, compiled in {self._compile_seconds:.1f} s:")
      without = ", if none ended early" if len(rungs) > 1 else ""
      lines.append(f"About {total:.0f} s of training{without}.")
    if later:
      more = counted(sum(map(len, later)), "more program")
      lines.append(
        f"{more}, {MOST_COMPILED} at a time, when these are trained."
      )
    for why, runs in self._alone:
      lines.append(f"{counted(len(runs), 'run')} one by one: {why}.")
    return "\n".join(lines)

  def train(self, since: int, until: int) -> None:
    """Train all runs that go on, until a round.

    Args:
      since: the round until which they were trained before.
      until: number of the round.
    """
    for batch in self._batches:
      goes_on = [t for t in batch if any(run.goes_on for run in t.runs)]
      if len(self._batches) > 1:
        self._fit(goes_on)
      for trainer in goes_on:
        trainer.train(since, until)
        if len(self._batches) > 1:
          trainer.program.release()
    self._folder.wait()
    for _, runs in self._alone:
      for run in runs:
        if run.goes_on:
          _train_alone(run, self._folder.run(run), until)

  def finish(self) -> None:
    """Write the summaries of the runs that are finished."""
    known = versions()
    for trainer in self._trainers:
      trainer.save()
      beside = {
        "wall_seconds": trainer.seconds / len(trainer.runs),
        "compilations": trainer.program.compilations,
        "versions": known,
      }
      for run in trainer.runs:
        if run.status == "finished":
          _summarize(trainer, run, self._folder.run(run), beside)
    self._folder.wait()


def _train_alone(run: StudyRun, folder: Path, until: int) -> None:
  """Train a run by itself, in its own folder."""
  own = run.config.copy_and_resolve_references()
  with own.unlocked():
    own.server.rounds = min(until, run.rounds)
  run.status = "running"
  try:
    summary = experiment.run(own, folder)
  except DivergedError as error:
    run.status, run.reason = "diverged", str(error)
    return
  run.done = int(summary["rounds"])
  if run.done == run.rounds:
    run.status = "finished"


def _summarize(
  trainer: Trainer, run: StudyRun, folder: Path, beside: Mapping[str, Any]
) -> None:
  """Write the summary of a finished run.

  Args:
    trainer: of the run.
    run: the run.
    folder: its own.
    beside: what the summaries of all runs of the program have in common.
  """
  if (folder / "summary.json").exists():
    return
  state, simulator = trainer.own_state(run), run.simulator
  rows = read_metrics(folder / "metrics.jsonl")
  params = simulator.algorithm.variables(state.server).params
  digests = tree_digest(params), trainer.data
  facts = result_facts(run.experiment, rows[-1], state, *digests)
  write_json(
    folder / "summary.json",
    {
      **facts,
      **beside,
      "lanes": run.config.runtime.lanes,
      "lanes_reason": "a row of a study",
      "devices": [str(simulator.mesh.devices.flat[0])],
      "device_kind": simulator.mesh.devices.flat[0].device_kind,
    },
  )


def counted(count: int, what: str) -> str:
  """Return "1 run", or "2 runs"."""
  return f"{count} {what}" if count == 1 else f"{count} {what}s"
