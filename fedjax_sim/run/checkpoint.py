"""Checkpoints that are whole or not there, and verified when they are read.

Orbax writes a checkpoint into a temporary folder, which takes its name when it
is complete, so a kill leaves the old one or the new one. What orbax does not
notice is a byte that changed on disk, and a torn file makes it print
tracebacks: the SHA-256 of every file is compared before it reads, that of
every leaf afterwards, and a checkpoint that fails makes way for the one before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import PyTree
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.files import UNSUPPORTED
from fedjax_sim.reporting import write_json

_UNFINISHED = ".unfinished"  # ends the name of a folder that is being written
_DAMAGED = ".damaged"  # ends the name of one that was set aside
_OVERHEAD = 2**20  # bytes, at most, that a checkpoint has besides its leaves
SUMS = "sha256.json"  # file of a checkpoint -> its SHA-256


class CheckpointError(FedjaxSimError, RuntimeError):
  """A checkpoint could not be written."""

  exit_code = 1


class StateChangedError(FedjaxSimError, ValueError):
  """A checkpoint is whole, but of a state with other leaves."""


class Restored(NamedTuple):
  """A checkpoint that was read.

  Attributes:
    round: rounds done.
    state: the state, numpy leaves.
    facts: what was stored with it.
  """

  round: int
  state: PyTree
  facts: dict[str, Any]


def digest(leaf: np.ndarray) -> str:
  """Return the SHA-256 of an array's dtype, shape and bytes."""
  total = hashlib.sha256(f"{leaf.dtype.name}{leaf.shape}".encode())
  total.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def tree_digest(tree: PyTree) -> str:
  """Return the SHA-256 over all leaves of a tree, in order."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    total.update(digest(np.asarray(leaf)).encode())
  return total.hexdigest()


def rounds_in(folder: Path) -> list[int]:
  """Return the rounds of which there is a checkpoint, in order."""
  names = [path.name for path in folder.glob("*")]
  return sorted(int(name) for name in names if name.isdecimal())


class Checkpoints:
  """The checkpoints of a run, in a folder of their own.

  Args:
    folder: made if it is missing; nobody else may use it at the same time.
    keep: how many of the newest to keep; 2 at least, to fall back.
  """

  def __init__(self, folder: Path, *, keep: int):
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._folder = folder.absolute()
    self._keep = max(2, keep)
    self._folder.mkdir(parents=True, exist_ok=True)
    self._remove(_UNFINISHED)
    # Of several processes only this one is here: it waits for no other.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix="checkpoints",
    )
    handler = ocp.CompositeCheckpointHandler(
      record=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
      state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
      composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    self._orbax = ocp.Checkpointer(handler, multiprocessing_options=alone)

  def rounds(self) -> list[int]:
    """Return the rounds of which there is a checkpoint, in order."""
    return rounds_in(self._folder)

  def save(self, round_: int, state: PyTree, facts: dict[str, Any]) -> None:
    """Write a checkpoint; return when it is committed.

    Checkpoints of this round and of later ones go first, since the run is being
    repeated; damaged ones go last.

    Args:
      round_: rounds done.
      state: a pytree of arrays.
      facts: anything JSON holds.

    Raises:
      CheckpointError: the disk is full or refuses; earlier checkpoints and
        nothing half-written are left.
    """
    leaves = [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state))]
    record = {
      "round": round_,
      "facts": facts,
      "leaves": _leaves(state),
      "sha256": [digest(leaf) for leaf in leaves],
    }
    args = self._ocp.args
    items = {"record": args.JsonSave(record)}
    # Orbax refuses arrays without elements; their shapes say it all.
    arrays = {_key(i): leaf for i, leaf in enumerate(leaves) if leaf.size}
    if arrays:
      items["state"] = args.PyTreeSave(arrays)
    unfinished = self._folder / f"{round_}{_UNFINISHED}"
    try:
      for later in self.rounds():
        if later >= round_:
          shutil.rmtree(self._path(later))
      _check_room(self._folder, sum(leaf.nbytes for leaf in leaves))
      self._orbax.save(unfinished, args.Composite(**items))
      write_json(unfinished / SUMS, _sums(unfinished))
      os.rename(unfinished, self._path(round_))
    except Exception as error:  # whatever a full disk makes orbax raise
      self._remove(_UNFINISHED)
      left = self.rounds()
      raise CheckpointError(
        f"The checkpoint of round {round_} could not be written to"
        f" {self._folder}: {_first_line(error)}. "
        + (f"That of round {left[-1]} is intact. " if left else "")
        + "Make room or correct the folder, and run the same command again."
      ) from error
    for old in self.rounds()[: -self._keep]:
      shutil.rmtree(self._path(old), ignore_errors=True)
    self._remove(_DAMAGED)

  def restore(
    self, like: PyTree, warn: Callable[[str], None]
  ) -> Restored | None:
    """Return the newest whole checkpoint; None if there is none.

    Damaged ones are set aside under another name until the next `save`.

    Args:
      like: a state of the same structure, shapes and dtypes.
      warn: is told about damaged checkpoints.

    Raises:
      StateChangedError: the newest whole checkpoint is of another state.
    """
    rounds = self.rounds()
    for round_ in reversed(rounds):
      try:
        return self._read(round_, like)
      except (MemoryError, PermissionError, StateChangedError):
        raise
      except Exception as error:  # whatever a torn file makes orbax raise
        warn(
          f"The checkpoint of round {round_} is damaged"
          f" ({_first_line(error)}); falling back to the one before."
        )
        self._set_aside(round_)
    if rounds:
      warn("No whole checkpoint is left; starting again from round 0.")
    return None

  def _read(self, round_: int, like: PyTree) -> Restored:
    args = self._ocp.args
    check_files(self._path(round_))
    record = self._load(round_, "record", args.JsonRestore())
    if record["round"] != round_:
      raise ValueError(f"it is of round {record['round']}")
    _check_leaves(round_, record["leaves"], _leaves(like))
    shapes = jax.tree.leaves(like)
    keys = [_key(i) for i, shape in enumerate(shapes) if math.prod(shape.shape)]
    as_numpy = self._ocp.RestoreArgs(restore_type=np.ndarray)
    arrays = {}
    if keys:
      restore = args.PyTreeRestore(
        item=dict.fromkeys(keys, 0),
        restore_args=dict.fromkeys(keys, as_numpy),
      )
      arrays = self._load(round_, "state", restore)
    leaves = []
    for i, (name, sha256) in enumerate(
      zip(record["leaves"], record["sha256"], strict=True)
    ):
      empty = np.zeros(shapes[i].shape, shapes[i].dtype)
      leaf = np.asarray(arrays.get(_key(i), empty))
      if digest(leaf) != sha256:
        raise ValueError(f"the SHA-256 of {name} differs")
      leaves.append(leaf)
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Restored(round_, state, record["facts"])

  def _load(self, round_: int, item: str, how: Any) -> Any:
    composite = self._ocp.args.Composite(**{item: how})
    return self._orbax.restore(self._path(round_), composite)[item]

  def close(self) -> None:
    """End orbax's threads."""
    self._orbax.close()

  def _path(self, round_: int) -> Path:
    return self._folder / str(round_)

  def _set_aside(self, round_: int) -> None:
    aside = self._folder / f"{round_}{_DAMAGED}"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(self._path(round_), aside)

  def _remove(self, mark: str) -> None:
    """Remove what has the mark in its name."""
    for path in self._folder.glob(f"*{mark}*"):
      with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _leaves(tree: PyTree) -> dict[str, str]:
  """Return the dtype and shape of each leaf, by its path, in order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path): f"{np.dtype(leaf.dtype).name}{leaf.shape}"
    for path, leaf in leaves
  }


def _check_leaves(
  round_: int, stored: dict[str, str], wanted: dict[str, str]
) -> None:
  if list(stored.items()) == list(wanted.items()):
    return
  names = sorted(stored.keys() | wanted.keys())
  odd = [
    f"{name}: {stored.get(name, 'missing')} -> {wanted.get(name, 'missing')}"
    for name in names
    if stored.get(name) != wanted.get(name)
  ]
  raise StateChangedError(
    f"The checkpoint of round {round_} is of a state with other leaves"
    f" ({'; '.join(odd[:3]) or 'in another order'}). Go on with the software"
    " and the number of devices that it began with, or take another"
    " --workdir."
  )


def _key(index: int) -> str:
  return f"leaf{index:05d}"


def _sums(folder: Path) -> dict[str, str]:
  """Return the SHA-256 of each file of a folder, but for that of the sums."""
  sums = {}
  for path in sorted(folder.rglob("*")):
    if path.is_file() and path.name != SUMS:
      with path.open("rb") as file:
        total = hashlib.file_digest(file, "sha256")
      sums[path.relative_to(folder).as_posix()] = total.hexdigest()
  return sums


def _check_room(folder: Path, size: int) -> None:
  """Raise OSError if the disk has no room for a checkpoint of `size` bytes.

  Orbax would report it, too, but with a traceback for every file.
  """
  path = folder / f"room{_UNFINISHED}"
  size += _OVERHEAD
  try:
    with path.open("wb") as file:
      os.posix_fallocate(file.fileno(), 0, size)
  except OSError as error:
    if error.errno not in UNSUPPORTED:
      raise
    if shutil.disk_usage(folder).free < size:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
  finally:
    path.unlink(missing_ok=True)


def check_files(folder: Path) -> None:
  """Raise ValueError or OSError for a file that is not as it was written."""
  wanted = json.loads((folder / SUMS).read_bytes())
  found = _sums(folder)
  for name in sorted(wanted.keys() | found.keys()):
    if name not in found:
      raise ValueError(f"{name} is missing")
    if found[name] != wanted.get(name):
      raise ValueError(f"the SHA-256 of {name} differs")


def _first_line(error: BaseException) -> str:
  text = str(getattr(error, "strerror", None) or error).strip()
  text = text or type(error).__name__
  line = text.splitlines()[0]
  return line if len(line) <= 200 else line[:200] + "..."
