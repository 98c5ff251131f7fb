"""How far the run in a workdir is, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sim.distributed import processes
from fedjax_sim.run.branch import Origin, origin_of
from fedjax_sim.run.changes import ROUNDS, Changes, changes_since
from fedjax_sim.run.workdir import (
  STUDY_FILE,
  WorkdirError,
  finished_summary,
  rounds_done,
)


class Standing(NamedTuple):
  """How far a run is.

  Attributes:
    changed: fields that change where it goes on.
    done: rounds of its newest checkpoint; 0 without any.
    origin: where it branches from; None: from nowhere.
    finished: its summary, if nothing is left to do; else None.
  """

  changed: Changes
  done: int
  origin: Origin | None
  finished: dict[str, Any] | None


def look(
  folder: Path, resolved: Mapping[str, Any], branch_from: str
) -> Standing:
  """Return how far the run in a workdir is, on all processes.

  Args:
    folder: the workdir, which the first process alone reads.
    resolved: the config of the run, complete, as JSON holds it.
    branch_from: see `branch.origin_of`.

  Raises:
    ConfigChangedError, WorkdirError: the workdir holds another run, or a
      damaged one.
    PeerError: in other processes, if the first one refuses.
  """

  def read() -> tuple[Changes, int, Any, dict[str, Any] | None]:
    if (folder / STUDY_FILE).exists():
      raise WorkdirError(
        f"--workdir={folder} holds a study; name another folder."
      )
    origin = origin_of(folder, branch_from)
    changed = changes_since(folder, resolved) or {}
    finished = None
    if ROUNDS not in changed:
      finished = finished_summary(folder, resolved["server"]["rounds"])
    plain = None if origin is None else origin._asdict()
    return changed, rounds_done(folder), plain, finished

  changed, done, origin, finished = processes.from_first(read)
  return Standing(
    changed, done, None if origin is None else Origin(**origin), finished
  )
