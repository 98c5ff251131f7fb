"""TensorBoard: event files in the workdir."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedjax_sim.reporting.events import EventFiles
from fedjax_sim.reporting.trackers.protocol import (
  Opened,
  Row,
  RunFacts,
  Status,
  Tracker,
)


def tensorboard(folder: str = "events") -> Tracker:
  """Write event files for TensorBoard, while rounds are trained.

  Args:
    folder: of the event files, in the workdir.

  Raises:
    ValueError: the folder is not inside the workdir.
  """
  if Path(folder).is_absolute() or ".." in Path(folder).parts or not folder:
    raise ValueError(
      f"folder={folder!r} is not inside the workdir; give a name such as"
      " 'events'."
    )
  return _TensorBoard(folder)


class _TensorBoard(Tracker):
  live = True

  def __init__(self, folder: str):
    self._folder = folder

  def open(self, run: RunFacts) -> Opened:
    folder = run.folder / self._folder
    self._events = EventFiles(folder, first_round=run.first_round)
    return Opened(self._folder)

  def send(self, rows: Sequence[Row]) -> None:
    self._events.write(rows)

  def flush(self) -> None:
    self._events.flush()

  def close(self, status: Status, files: Sequence[Path]) -> None:
    del status, files
    self._events.close()
