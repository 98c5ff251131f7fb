"""A folder of a bucket: its files, and the lock of the run that writes there.

A bucket knows no locks. The lock here is an object that its owner writes anew
every few seconds, so one that nobody has renewed for a while is nobody's. Two
runs that begin within the same moment may both get it; the one that finds the
other's name in it stops writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from fedjax_sim.data import remote
from fedjax_sim.run.workdir import WorkdirError

LOCK = "lock.json"
BEAT_SECONDS = 20.0  # between two heartbeats
STALE_SECONDS = 60.0  # without one, after which a lock is nobody's
_PART = ".part"  # ends the name of a file that is being written
_WHOLE = 2**23  # bytes of a file that is sent in one piece


class Bucket:
  """A folder of a bucket.

  Args:
    url: as fsspec knows it, such as s3://bucket/folder.

  Raises:
    ModuleNotFoundError: fsspec, or what it needs for this bucket, is missing.
    ValueError: no bucket has such URLs.
  """

  def __init__(self, url: str):
    self.url = url.rstrip("/")
    self._files, self._base = remote.file_system_of(self.url)
    self._base = self._base.rstrip("/")

  def sizes(self) -> dict[str, int]:
    """Return each file's size in bytes, by its path in the folder.

    Raises:
      OSError: the network or the bucket refuses; so all methods.
    """
    with remote.naming(self.url, "cannot be listed"):
      self._files.invalidate_cache()
      try:
        found = self._files.find(self._base, detail=True)
      except FileNotFoundError:
        return {}
    names = {
      path[len(self._base) + 1 :]: int(facts["size"] or 0)
      for path, facts in found.items()
    }
    return {
      name: size
      for name, size in names.items()
      if name and ".." not in name.split("/") and not name.endswith(_PART)
    }

  def read(self, name: str) -> bytes | None:
    """Return a file's content; None if there is no such file."""
    with remote.naming(self.url, f"{name} cannot be read"):
      try:
        content: bytes = self._files.cat_file(self._place(name))
      except FileNotFoundError:
        return None
      return content

  def write(self, name: str, content: bytes) -> None:
    """Write a file, which is there whole or as it was before."""
    with remote.naming(self.url, f"{name} cannot be written"):
      self._put(name, lambda place: self._files.pipe_file(place, content))

  def send(self, path: Path, name: str, size: int) -> None:
    """Copy the first `size` bytes of a file of the disk, as `write` does."""

    def stream(place: str) -> None:
      with path.open("rb") as source:
        if size <= _WHOLE:
          self._files.pipe_file(place, source.read(size))
          return
        with self._files.open(place, "wb") as file:
          left = size
          while left and (block := source.read(min(left, _WHOLE))):
            file.write(block)
            left -= len(block)

    with remote.naming(self.url, f"{name} cannot be sent"):
      self._put(name, stream)

  def fetch(self, name: str, path: Path) -> None:
    """Copy a file to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with remote.naming(self.url, f"{name} cannot be fetched"):
      self._files.get_file(self._place(name), str(path))

  def remove(self, name: str) -> None:
    """Remove a file, if it is there."""
    with (
      remote.naming(self.url, f"{name} cannot be removed"),
      contextlib.suppress(FileNotFoundError),
    ):
      self._files.rm_file(self._place(name))

  def _place(self, name: str) -> str:
    return posixpath.join(self._base, name)

  def _put(self, name: str, write: Any) -> None:
    place = self._place(name)
    if not remote.has_folders(place):  # an object appears when it is whole
      write(place)
      return
    self._files.makedirs(posixpath.dirname(place), exist_ok=True)
    write(place + _PART)
    self._files.mv(place + _PART, place)


class Lock:
  """The lock of a bucket's folder, with a heartbeat in a thread.

  Args:
    bucket: the folder.
  """

  def __init__(self, bucket: Bucket):
    self._bucket = bucket
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
    self._refuse_other()

  def release(self) -> None:
    """Give the lock back, if it is held; errors do not matter any more."""
    self._ended.set()
    if self._thread is None:
      return
    with contextlib.suppress(OSError):
      if self._held().get("token") == self._token:
        self._bucket.remove(LOCK)

  def _held(self) -> dict[str, Any]:
    """Return what the lock says; empty if there is none."""
    with contextlib.suppress(ValueError):
      held = json.loads(self._bucket.read(LOCK) or b"{}")
      if isinstance(held, dict):
        return held
    return {}

  def _refuse_other(self) -> None:
    held = self._held()
    if not held or held.get("token") == self._token:
      return
    age = time.time() - float(held.get("time", 0.0))
    if age >= STALE_SECONDS or _is_gone(held):
      return
    raise WorkdirError(
      f"{self._bucket.url} is in use by another run (process"
      f" {held.get('process')} on {held.get('host')}, heard of"
      f" {max(age, 0):.0f} s ago): stop that one; if it was killed, run the"
      f" same command again in {STALE_SECONDS - age:.0f} s, or remove"
      f" {self._bucket.url}/{LOCK}."
    )

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
    while not self._ended.wait(BEAT_SECONDS):
      # A network that fails for a while is told by what cannot be sent.
      with contextlib.suppress(OSError):
        if self._held().get("token", self._token) == self._token:
          self._beat()


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
  except (OSError, KeyError, ValueError):
    return False
  return False
