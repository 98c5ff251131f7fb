"""Signals that end a run after the current dispatch."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from fedjax_sim.core.errors import FedjaxSimError

REPEATED_SECONDS = 2.0  # within which a signal is the same one again


class Interrupted(FedjaxSimError):
  """A signal ended the run after a checkpoint."""

  def __init__(self, number: int, round_: int, workdir: Path):
    self.exit_code = 128 + number
    super().__init__(
      f"{signal.Signals(number).name}: stopped after round {round_}, of which a"
      f" checkpoint is in {workdir}. Run the same command again to go on."
    )


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
  """Collect the first SIGTERM or SIGINT; a second one acts as usual.

  Where there are several processes, one that follows within
  `REPEATED_SECONDS` is ignored: batch systems signal a process and its parent,
  which passes the signal on.

  Yields:
    The signals received so far.
  """
  patience = REPEATED_SECONDS if jax.process_count() > 1 else 0.0
  began = 0.0
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return
  before: dict[int, Any] = {}

  def usual() -> None:
    for number, handler in before.items():
      # None: it was not installed from Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def note(number: int, frame: FrameType | None) -> None:
    nonlocal began
    del frame
    now = time.monotonic()
    if received and now - began < patience:
      return
    received.append(number)
    began = now
    if len(received) > 1:
      usual()
      signal.raise_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    before[number] = signal.signal(number, note)
  try:
    yield received
  finally:
    usual()
