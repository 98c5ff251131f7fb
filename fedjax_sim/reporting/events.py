"""TensorBoard event files.

Records are written by the thread that trains: a queue to another one could lose
rows before a checkpoint to a kill.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from fedjax_sim.reporting import event_records
from fedjax_sim.reporting.metrics_file import Row

_FLUSH_SECONDS = 5.0


class EventFiles:
  """Writes rows as scalars.

  Each process adds a file of its own to the folder. It begins by telling
  TensorBoard to forget what earlier files say of its rounds.
  """

  def __init__(self, logdir: str | os.PathLike[str], *, first_round: int = 1):
    """Open a new event file.

    Args:
      logdir: the folder of the run's event files; made if missing.
      first_round: the first round that this process writes.
    """
    Path(logdir).mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files in the order of their names. A process that
    # starts again within a second, at the same round, may replace the file.
    name = (
      f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
      f".{first_round:09d}"
    )
    self._file = Path(logdir, name).open("wb")  # noqa: SIM115, see `close`
    self._file.write(event_records.file_version(time.time()))
    self._file.write(event_records.session_start(time.time(), first_round))
    self.flush()

  def write(self, rows: Iterable[Row]) -> None:
    """Write all that the rows hold, other than the round, as scalars."""
    for row in rows:
      values = {k: float(v) for k, v in row.items() if k != "round"}
      step = int(row["round"])
      self._file.write(event_records.scalars(time.time(), step, values))
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Write all rows to the file; call it before a checkpoint commits."""
    self._file.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flush and close the file; twice is harmless."""
    self._file.close()  # a full disk leaves no file open, either
