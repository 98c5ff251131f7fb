"""TensorBoard event files.

Records are written one by one with tensorboardX's `RecordWriter`, not with its
`SummaryWriter`: that one hands events to a thread through a queue which its
`flush` does not empty, so rows before a checkpoint could be lost to a kill.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    from tensorboardX import RecordWriter

    Path(logdir).mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files in the order of their names. A process that
    # starts again within a second, at the same round, may replace the file.
    name = (
      f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
      f".{first_round:09d}"
    )
    self._writer: Any = RecordWriter(os.path.join(logdir, name))
    self._closed = False
    self._write(file_version="brain.Event:2")
    self._write(step=first_round, session_log={"status": "START"})
    self.flush()

  def write(self, rows: Iterable[Row]) -> None:
    """Write all that the rows hold, other than the round, as scalars."""
    for row in rows:
      values = [
        {"tag": key, "simple_value": float(value)}
        for key, value in row.items()
        if key != "round"
      ]
      self._write(step=int(row["round"]), summary={"value": values})
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Write all rows to the file; call it before a checkpoint commits."""
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flush and close the file; twice is harmless."""
    if not self._closed:
      self._closed = True
      try:
        self.flush()
      finally:  # a full disk leaves no file open
        self._writer.close()

  def _write(self, **fields: Any) -> None:
    from tensorboardX.proto import event_pb2

    event = event_pb2.Event(wall_time=time.time(), **fields)
    self._writer.write(event.SerializeToString())
