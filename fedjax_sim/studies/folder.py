"""The folder of a study: what it is, its runs, and its checkpoints.

`study.json` says what the study is and how far its runs are; `runs/NAME/` is
the folder of a run (`config.json`, `metrics.jsonl`, and at its end
`summary.json`); `programs/N/checkpoints/` holds the states of all runs of a
program. A kill leaves the newest checkpoint, and metrics are cut back to it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_sim import config as configs
from fedjax_sim.config.build.privacy import account
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.data import profile as data_profile
from fedjax_sim.engine.state import RunState
from fedjax_sim.privacy.accounting import composition
from fedjax_sim.reporting import MetricsFile, write_json
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.checkpoint_reader import Restored
from fedjax_sim.run.resume import warn
from fedjax_sim.run.workdir import WorkdirError, locked
from fedjax_sim.studies.record import (
  FORMAT,
  STUDY_FILE,
  checkpoints_of,
  read_study,
)
from fedjax_sim.studies.runs import StudyRun


class StudyInterrupted(FedjaxSimError):
  """A signal ended the study after a checkpoint."""

  def __init__(self, number: int, folder: Path):
    self.exit_code = 128 + number
    super().__init__(
      f"{signal.Signals(number).name}: stopped; the checkpoints in {folder}"
      " hold all that was done. Run the same command again to go on."
    )


class StudyFolder:
  """The folder of a study, which this process holds.

  Args:
    path: the folder; it is there.
  """

  def __init__(self, path: Path):
    self.path = path
    self._checkpoints: dict[int, Checkpoints] = {}
    self._described: Mapping[str, Any] = {}
    self._runs: Sequence[StudyRun] = []

  def run(self, run: StudyRun) -> Path:
    """Return the folder of a run."""
    return self.path / "runs" / run.name

  def begin(
    self,
    described: Mapping[str, Any],
    runs: Sequence[StudyRun],
    metric: str,
    higher_is_better: bool,
  ) -> None:
    """Write what the study is, or compare with what is there.

    Args:
      described: what makes it this study, as JSON holds it.
      runs: all of its runs.
      metric: by which settings are compared.
      higher_is_better: its direction.

    Raises:
      WorkdirError: the folder holds another study, a run, or something else.
    """
    there = read_study(self.path)
    if there is None:
      self._check_empty()
    elif (before := there["study"]) != described:
      changed = sorted(
        key
        for key in {*before, *described}
        if before.get(key) != described.get(key)
      )
      raise WorkdirError(
        f"--studydir={self.path} holds another study: {', '.join(changed)}"
        " differ. Give what it was begun with, or name another folder."
      )
    profiles: dict[int, dict[str, Any]] = {}  # runs share their data sets
    for run in runs:
      folder = self.run(run)
      folder.mkdir(parents=True, exist_ok=True)
      if not (folder / "config.json").exists():
        facts = account(run.config, run.simulator, run.rounds)
        if facts is not None:
          write_json(folder / composition.FILE, facts)
        data = run.simulator.data
        if id(data) not in profiles:
          profiles[id(data)] = data_profile.profile_of(data)
        write_json(folder / data_profile.FILE, profiles[id(data)])
        write_json(folder / "config.json", configs.resolved(run.config))
    by = {"metric": metric, "higher_is_better": higher_is_better}
    self._described, self._runs = {"study": described, **by}, runs
    if there is None:
      self.tell()

  def _check_empty(self) -> None:
    """Refuse a folder with something else in it.

    What a study leaves that was killed at its very beginning may be there.
    """
    if (self.path / "config.json").exists():
      raise WorkdirError(
        f"--studydir={self.path} holds a run; name another folder."
      )
    there = {path.name for path in self.path.iterdir()}
    if others := sorted(there - {".lock", "runs"}):
      raise WorkdirError(
        f"--studydir={self.path} holds other files, such as {others[0]}; name a"
        " new folder."
      )

  def tell(self) -> None:
    """Write `study.json`: what the study is, and how far its runs are."""
    described, runs = self._described, self._runs
    write_json(
      self.path / STUDY_FILE,
      {
        "format": FORMAT,
        "fields": list(runs[0].point),
        **described,
        "runs": [
          {
            "name": run.name,
            "point": run.point,
            "seed": run.seed,
            "program": run.program,
            "status": run.status,
            "reason": run.reason,
            "rounds": run.done,
          }
          for run in runs
        ],
      },
    )

  def metrics(self, run: StudyRun) -> MetricsFile:
    """Open the metrics of a run, cut back to the rounds that it has done."""
    return MetricsFile(self.run(run) / "metrics.jsonl", keep_through=run.done)

  def checkpoints(self, program: int) -> Checkpoints:
    """Return the checkpoints of a program."""
    if program not in self._checkpoints:
      place = checkpoints_of(self.path, program)
      self._checkpoints[program] = Checkpoints(place, keep=2)
    return self._checkpoints[program]

  def save(
    self,
    program: int,
    number: int,
    state: RunState,
    runs: Sequence[StudyRun],
    facts: Mapping[str, Any],
  ) -> None:
    """Begin to write a checkpoint of all runs of a program, and tell of them.

    Args:
      program: its number.
      number: of the checkpoint, one more than that of the one before.
      state: leaves (runs, ...).
      runs: in the same order.
      facts: what else to keep, as JSON holds it.
    """
    kept = {
      **facts,
      "runs": [
        {
          "name": run.name,
          "done": run.done,
          "status": run.status,
          "reason": run.reason,
        }
        for run in runs
      ],
    }
    self.wait()  # several writers at a time get into each other's way
    self.checkpoints(program).save_later(number, state, kept)
    self.tell()

  def restore(
    self, program: int, like: RunState, runs: Sequence[StudyRun]
  ) -> Restored | None:
    """Return the newest checkpoint of a program; runs learn how far they are.

    Returns:
      The checkpoint, whose `round` is its number; None if there is none.

    Raises:
      WorkdirError: it is of other runs.
    """
    found = self.checkpoints(program).restore(like, warn)
    if found is None:
      return None
    names = [entry["name"] for entry in found.facts["runs"]]
    if names != [run.name for run in runs]:
      raise WorkdirError(
        f"--studydir={self.path}: program {program} has other runs than before;"
        " go on with the version of fedjax_sim that began the study, or name"
        " another folder."
      )
    for run, entry in zip(runs, found.facts["runs"], strict=True):
      run.done, run.reason = entry["done"], entry["reason"]
      run.status = entry["status"]
    return found

  def wait(self) -> None:
    """Return when all checkpoints are on the disk."""
    for checkpoints in self._checkpoints.values():
      checkpoints.wait()

  def interrupted(self, number: int) -> StudyInterrupted:
    """Return the error for a signal."""
    return StudyInterrupted(number, self.path)

  def close(self) -> None:
    """Wait for what is being written, and end all threads."""
    for checkpoints in self._checkpoints.values():
      checkpoints.close()


@contextlib.contextmanager
def held(path: Path) -> Iterator[StudyFolder]:
  """Yield the folder of a study, and keep other processes out of it.

  Raises:
    WorkdirError: another process uses it, or it cannot be written.
  """
  try:
    stack = contextlib.ExitStack()
    stack.enter_context(locked(path))
  except WorkdirError as error:
    raise WorkdirError(str(error).replace("--workdir", "--studydir")) from error
  with stack:
    folder = StudyFolder(path)
    with contextlib.closing(folder):
      yield folder
