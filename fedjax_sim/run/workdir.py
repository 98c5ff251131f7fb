"""The workdir of a run: its lock, its config, errors of writing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.files import UNSUPPORTED
from fedjax_sim.distributed import processes
from fedjax_sim.run.checkpoint_files import rounds_in

STUDY_FILE = "study.json"  # in the folder of a study, which holds many runs
_SEEN_SECONDS = 5.0  # until another host sees a file on a network file system


class ConfigChangedError(FedjaxSimError, ValueError):
  """The workdir belongs to a run with another config, or with other data."""


class WorkdirError(FedjaxSimError, OSError):
  """The workdir cannot be used."""


class WriteError(FedjaxSimError, RuntimeError):
  """A result could not be written; what the last checkpoint holds is safe."""

  exit_code = 1


@contextlib.contextmanager
def as_write_error(folder: Path) -> Iterator[None]:
  """Name the checkpoint that is left where the disk refuses."""
  try:
    yield
  except FedjaxSimError:  # it says itself what is wrong
    raise
  except OSError as error:
    kept = rounds_in(folder / "checkpoints")
    where = f"{error.filename}: " if error.filename else ""
    raise WriteError(
      f"The run in {folder} stopped: {where}{error.strerror or error}. "
      + (f"The checkpoint of round {kept[-1]} is intact. " if kept else "")
      + "Make room or correct the folder, and run the same command again."
    ) from error


def rounds_done(folder: Path) -> int:
  """Return the rounds of the newest checkpoint in a workdir; 0 without any."""
  return max(rounds_in(folder / "checkpoints"), default=0)


def finished_summary(folder: Path, rounds: int) -> dict[str, Any] | None:
  """Return the summary of a finished run; None if it is not finished.

  A summary of fewer rounds than the run wants is an older one, which a copy of
  the workdir in part may hold.

  Args:
    folder: the workdir.
    rounds: that the run wants, of which a privacy budget may leave fewer.

  Raises:
    WorkdirError: the summary is damaged.
  """
  path = folder / "summary.json"
  if not path.exists():
    return None
  try:
    summary: dict[str, Any] = json.loads(path.read_bytes())
    _ = summary["lanes"]
    wanted = 0 if "privacy_budget" in summary else rounds
    is_older = summary["rounds"] < max(wanted, rounds_done(folder))
  except (ValueError, KeyError, TypeError) as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); remove it, and run the same command again."
    ) from error
  return None if is_older else summary


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Make the workdir, and keep other processes out of it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
  except FileExistsError as error:
    raise WorkdirError(
      f"--workdir={folder} is a file; name a folder."
    ) from error
  except OSError as error:
    raise WorkdirError(
      f"--workdir={folder} cannot be written: {error.strerror}; name another."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in UNSUPPORTED:
        raise _unsupported(folder, "flock", error) from error
      raise WorkdirError(
        f"--workdir={folder} is in use by another process; wait for it, or"
        " take another."
      ) from None
    _check_file_system(folder)
    yield


def is_seen_by_all(folder: Path) -> bool:
  """Return whether all processes see the same folder; all have to call it.

  Args:
    folder: of process 0; it is there.
  """
  token = secrets.token_hex(8)
  path = folder / f".seen-{token}"

  def write() -> str:
    path.touch()
    return token

  told = folder / f".seen-{processes.from_first(write)}"
  end = time.monotonic() + _SEEN_SECONDS
  while not told.exists() and time.monotonic() < end:
    time.sleep(0.1)
  (missing,) = processes.greatest(not told.exists())
  if processes.is_first():
    path.unlink(missing_ok=True)
  return not missing


def _check_file_system(folder: Path) -> None:
  """Refuse a file system without what keeps results safe at any kill.

  Raises:
    WorkdirError: names what is missing.
  """
  probe = folder / ".probe"
  shutil.rmtree(probe, ignore_errors=True)
  call = "mkdir"
  try:
    probe.mkdir()
    file, renamed = probe / "file", probe / "renamed"
    file.touch()
    renamed.touch()
    call = "fsync"
    with file.open("rb+") as opened:
      os.fsync(opened.fileno())
    call = "rename"
    os.replace(file, renamed)
    made = probe / "folder"
    made.mkdir()
    os.rename(made, probe / "whole")
    call = "fsync of a folder"
    handle = os.open(probe, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      return  # what is written first says so
    raise _unsupported(folder, call, error) from error
  finally:
    shutil.rmtree(probe, ignore_errors=True)


def _unsupported(folder: Path, call: str, error: OSError) -> WorkdirError:
  return WorkdirError(
    f"--workdir={folder}: its file system refuses {call} ({error.strerror}),"
    " without which a run that is killed may lose its results; give a --workdir"
    " on a local disk, with --sync-to=URL for a copy in a bucket."
  )
