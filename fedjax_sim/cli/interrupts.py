"""Interrupts while a command runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Stopped(KeyboardInterrupt):
  """A signal asks the process to end."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
  """Raise `Stopped` on Ctrl-C and the like, so that half a file is removed."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Stopped(number)

  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = {n: signal.getsignal(n) for n in numbers}
  before = {n: h for n, h in before.items() if h != signal.SIG_IGN}  # nohup
  for number in before:
    signal.signal(number, stop)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def prompt_interrupts() -> Iterator[None]:
  """Let Ctrl-C end the process at once, unless a run saves itself first.

  As an exception it would be lost in the middle of an import.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(sys.stderr.fileno(), b"fedjax-sim: interrupted\n")
    os._exit(128 + signal.SIGINT)

  before = signal.signal(signal.SIGINT, leave)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
