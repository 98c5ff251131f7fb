"""The workdir of a run: its lock, its config, errors of writing."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.run.checkpoint import rounds_in


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


def finished_summary(folder: Path) -> dict[str, Any] | None:
  """Return the summary of a finished run; None if it is not finished."""
  path = folder / "summary.json"
  if not path.exists():
    return None
  try:
    summary: dict[str, Any] = json.loads(path.read_bytes())
    _ = summary["lanes"], summary["rounds"]
  except (ValueError, KeyError, TypeError) as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); remove it, and run the same command again."
    ) from error
  return summary


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
    except OSError:
      raise WorkdirError(
        f"--workdir={folder} is in use by another process; wait for it, or"
        " take another."
      ) from None
    yield
