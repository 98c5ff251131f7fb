"""The lock of a bucket's folder, which keeps a second run out of it.

A bucket knows no locks. This one is an object that its owner writes anew every
few seconds. One that looks old may be of a host whose clock is wrong, so it is
watched: it is nobody's if it does not change meanwhile. Two runs that begin
within the same moment may both get it; the one that finds the other's name in
it stops writing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedjax_sim.run.bucket.folder import Bucket
from fedjax_sim.run.workdir import WorkdirError

LOCK = "lock.json"
BEAT_SECONDS = 20.0  # between two heartbeats
STALE_SECONDS = 60.0  # without one, after which a lock may be nobody's
WATCH_SECONDS = 45.0  # without a change, after which such a lock is nobody's
_LOOK_SECONDS = 1.0  # between two looks at a lock that is watched
_JOIN_SECONDS = 15.0  # that the end waits for a heartbeat under way


class Lock:
  """The lock of a bucket's folder, with a heartbeat in a thread.

  Args:
    bucket: the folder.
    say: is given a line before there is something to wait for.
  """

  def __init__(self, bucket: Bucket, say: Callable[[str], None]):
    self._bucket, self._say = bucket, say
    self._token = uuid.uuid4().hex
    self._ended = threading.Event()
    self._thread: threading.Thread | None = None

  def take(self) -> None:
    """Take the lock, unless it is held already.

    Raises:
      WorkdirError: another run has it.
      OSError: the network or the bucket refuses.
    """
    if self._thread is not None:
      return
    self._refuse_other()
    self._beat()
    self._refuse_other()
    self._thread = threading.Thread(target=self._beats, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raise WorkdirError if another run has taken the lock meanwhile."""
    if self._refuse_other():
      self._beat()

  def release(self) -> None:
    """Give the lock back, if it is held; errors do not matter any more."""
    self._ended.set()
    if self._thread is not None:
      self._thread.join(_JOIN_SECONDS)

  def _held(self) -> dict[str, Any]:
    """Return what the lock says; empty if there is none."""
    with contextlib.suppress(ValueError):
      held = json.loads(self._bucket.read(LOCK) or b"{}")
      if isinstance(held, dict):
        return held
    return {}

  def _refuse_other(self) -> bool:
    """Refuse another run's lock, unless nobody renews it.

    Returns:
      Whether there is one, which nobody renews.
    """
    held = self._held()
    if not held or held.get("token") == self._token:
      return False
    if _is_gone(held):
      return True
    age = _age(held)
    if abs(age) >= STALE_SECONDS:
      renewed = self._watched(held)
      if renewed is None:
        return True
      held, age = renewed, 0.0
    raise WorkdirError(
      f"{self._bucket.name} is in use by another run (process"
      f" {held.get('process')} on {held.get('host')}, heard of"
      f" {max(age, 0):.0f} s ago): stop that one; if it was killed, run the"
      f" same command again in {STALE_SECONDS - age:.0f} s, or remove"
      f" {self._bucket.name}/{LOCK}."
    )

  def _watched(self, held: dict[str, Any]) -> dict[str, Any] | None:
    """Return another run's lock when it changes; None if it does not.

    Args:
      held: what the lock says.
    """
    self._say(
      f"{self._bucket.name} may be in use by another run (process"
      f" {held.get('process')} on {held.get('host')}): looking for up to"
      f" {WATCH_SECONDS:.0f} s whether it is."
    )
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
      if self._ended.wait(min(_LOOK_SECONDS, WATCH_SECONDS)):
        return held  # nobody waits for the answer any more
      now = self._held()
      if not now or now.get("token") == self._token:
        return None
      if now != held:
        return now
    return None

  def _beat(self) -> None:
    says = {
      "token": self._token,
      "host": socket.gethostname(),
      "machine": _machine(),
      "process": os.getpid(),
      "time": time.time(),
    }
    self._bucket.write(LOCK, json.dumps(says).encode())

  def _beats(self) -> None:
    """Renew the lock until the end, and remove it: nothing is written later."""
    while not self._ended.wait(BEAT_SECONDS):
      # A network that fails for a while is told by what cannot be sent.
      with contextlib.suppress(OSError):
        if self._held().get("token", self._token) == self._token:
          self._beat()
    with contextlib.suppress(OSError):
      if self._held().get("token") == self._token:
        self._bucket.remove(LOCK)


def _age(held: dict[str, Any]) -> float:
  """Return the seconds since a heartbeat, by the clocks of two hosts."""
  try:
    return time.time() - float(held["time"])
  except (KeyError, TypeError, ValueError):
    return math.inf


def _machine() -> str:
  """Return what tells apart where process numbers mean the same; "" if none."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _is_gone(held: dict[str, Any]) -> bool:
  """Return whether the lock's owner ran here, and was killed."""
  machine = _machine()
  if not machine or held.get("machine") != machine:
    return False
  try:
    os.kill(int(held["process"]), 0)
  except ProcessLookupError:
    return True
  except (OSError, KeyError, TypeError, ValueError):
    return False
  return False
