"""The workdir of a run: its lock, its config, errors of writing."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedjax_sim import config as configs
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.run.checkpoint import rounds_in

# Sections of the config that change no result, so a run may resume with others.
SECTIONS_THAT_MAY_DIFFER = ("trackers",)


class ConfigChangedError(FedjaxSimError, ValueError):
  """The workdir belongs to a run with another config, or with other data."""


class WorkdirError(FedjaxSimError, OSError):
  """The workdir cannot be used."""


class WriteError(FedjaxSimError, RuntimeError):
  """A result could not be written; what the last checkpoint holds is safe."""

  exit_code = 1


def decisive(resolved: Mapping[str, Any]) -> dict[str, Any]:
  """Return the sections of a config that the results depend on."""
  return {
    name: section
    for name, section in resolved.items()
    if name not in SECTIONS_THAT_MAY_DIFFER
  }


@contextlib.contextmanager
def as_write_error(folder: Path) -> Iterator[None]:
  """Names the checkpoint that is left where the disk refuses."""
  try:
    yield
  except OSError as error:
    kept = rounds_in(folder / "checkpoints")
    where = f"{error.filename}: " if error.filename else ""
    raise WriteError(
      f"The run in {folder} stopped: {where}{error.strerror or error}. "
      + (f"The checkpoint of round {kept[-1]} is intact. " if kept else "")
      + "Make room or correct the folder, and run the same command again."
    ) from error


def refuse_other_config(folder: Path, resolved: dict[str, Any]) -> None:
  """Refuse a folder that holds the run of another config."""
  path = folder / "config.json"
  if not path.exists():
    if (folder / "summary.json").exists() or (folder / "checkpoints").exists():
      raise WorkdirError(
        f"{folder} holds a run, but its config.json is missing; restore it, or"
        " take another --workdir."
      )
    return
  try:
    stored, now = decisive(json.loads(path.read_bytes())), decisive(resolved)
    older = stored.keys() != now.keys()
    changed = configs.differences(stored, now)
  except (ValueError, AttributeError) as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); restore it, or take another --workdir."
    ) from error
  if older:
    raise ConfigChangedError(
      f"The run in {folder} was begun by another version of fedjax_sim, whose"
      " configs have other sections. Take another --workdir, or go on with that"
      " version."
    )
  if changed:
    raise ConfigChangedError(
      f"The run in {folder} has another config: {'; '.join(changed)}. Take"
      " another --workdir, or the config that it began with."
    )


def finished_summary(folder: Path) -> dict[str, Any] | None:
  """The summary of a finished run."""
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
  """Makes the workdir and keeps other processes out of it."""
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
