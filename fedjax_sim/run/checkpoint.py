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
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import PyTree
from fedjax_sim.core.digests import digest
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.files import UNSUPPORTED
from fedjax_sim.reporting import write_json

_UNFINISHED = ".unfinished"  # ends the name of a folder that is being written
_DAMAGED = ".damaged"  # ends the name of one that was set aside
_OVERHEAD = 2**20  # bytes, at most, that a checkpoint has besides its leaves
_RECORD = "record"  # folder of a checkpoint: what is known of its leaves
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


def rounds_in(folder: Path) -> list[int]:
  """Return the rounds of which there is a checkpoint, in order."""
  names = [path.name for path in folder.glob("*")]
  return sorted(int(name) for name in names if name.isdecimal())


class CheckpointReader:
  """Reads checkpoints, and changes nothing in their folder.

  Args:
    folder: of the checkpoints; a run may write there at the same time.

  Attributes:
    ocp: the library.
    orbax: its reader and writer of one checkpoint.
  """

  def __init__(self, folder: Path):
    import orbax.checkpoint as ocp

    self.ocp = ocp
    self._folder = folder.absolute()
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
    self.orbax = ocp.Checkpointer(handler, multiprocessing_options=alone)

  def rounds(self) -> list[int]:
    """Return the rounds of which there is a checkpoint, in order."""
    return rounds_in(self._folder)

  def read(
    self,
    round_: int,
    like: PyTree,
    wanted: Callable[[PyTree], PyTree] | None = None,
  ) -> Restored:
    """Read the checkpoint of a round, verified.

    Args:
      round_: rounds done.
      like: a state of the same structure, shapes and dtypes.
      wanted: state -> the part of it that is read; None: all of it, and the
        files are verified before orbax reads them.

    Returns:
      The checkpoint, with that part as its state.

    Raises:
      StateChangedError: it is of another state.
      Exception: it is damaged or gone, whatever makes orbax raise.
    """
    args = self.ocp.args
    check_files(self.path(round_), "" if wanted is None else _RECORD)
    record = self._load(round_, _RECORD, args.JsonRestore())
    if record["round"] != round_:
      raise ValueError(f"it is of round {record['round']}")
    _check_leaves(round_, record["leaves"], _leaves(like))
    shapes = jax.tree.leaves(like)
    structure = jax.tree.structure(like)
    part = lambda leaves: jax.tree.unflatten(structure, leaves)
    if wanted is not None:
      part = lambda leaves: wanted(jax.tree.unflatten(structure, leaves))
    places = jax.tree.leaves(part(range(len(shapes))))
    keys = [_key(i) for i in places if math.prod(shapes[i].shape)]
    as_numpy = self.ocp.RestoreArgs(restore_type=np.ndarray)
    arrays = {}
    if keys:
      restore = args.PyTreeRestore(
        item=dict.fromkeys(keys, 0),
        restore_args=dict.fromkeys(keys, as_numpy),
        partial_restore=wanted is not None,
      )
      arrays = self._load(round_, "state", restore)
    names = list(record["leaves"])
    leaves: list[np.ndarray | None] = [None] * len(shapes)
    for i in places:
      empty = np.zeros(shapes[i].shape, shapes[i].dtype)
      leaf = np.asarray(arrays.get(_key(i), empty))
      if digest(leaf) != record["sha256"][i]:
        raise ValueError(f"the SHA-256 of {names[i]} differs")
      leaves[i] = leaf
    return Restored(round_, part(leaves), record["facts"])

  def _load(self, round_: int, item: str, how: Any) -> Any:
    composite = self.ocp.args.Composite(**{item: how})
    return self.orbax.restore(self.path(round_), composite)[item]

  def close(self) -> None:
    """End orbax's threads."""
    self.orbax.close()

  def path(self, round_: int) -> Path:
    """Return the folder of a checkpoint."""
    return self._folder / str(round_)


class Checkpoints:
  """The checkpoints of a run, in a folder of their own.

  Args:
    folder: made if it is missing; nobody else may write there at the same time.
    keep: how many of the newest to keep; 2 at least, to fall back.
    snapshot_every: those of its multiples, with round 0, are kept besides; None
      for none.

  Attributes:
    on_commit: is given the round of each checkpoint when it is committed and
      those before it are pruned, by the thread that writes.
  """

  on_commit: Callable[[int], None]

  def __init__(
    self, folder: Path, *, keep: int, snapshot_every: int | None = None
  ):
    self._reader = CheckpointReader(folder)
    self._ocp, self._orbax = self._reader.ocp, self._reader.orbax
    self._folder = folder.absolute()
    self._keep = max(2, keep)
    self._snapshot_every = snapshot_every
    self._folder.mkdir(parents=True, exist_ok=True)
    self._remove(_UNFINISHED)
    self.on_commit = lambda round_: None
    self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
    self._writing: futures.Future[None] | None = None

  def rounds(self) -> list[int]:
    """Return the rounds of which there is a checkpoint, in order."""
    return self._reader.rounds()

  def save(self, round_: int, state: PyTree, facts: dict[str, Any]) -> None:
    """Write a checkpoint; return when it is committed.

    The arguments and errors are those of `save_later`.
    """
    self.save_later(round_, state, facts)
    self.wait()

  def save_later(
    self, round_: int, state: PyTree, facts: dict[str, Any]
  ) -> None:
    """Copy a state and return; a thread writes and commits the checkpoint.

    The checkpoint before is waited for. What is said of a round that is to be
    on the disk before the commit has to be there when this is called.

    Checkpoints of this round and of later ones go first, since the run is being
    repeated; damaged ones go last.

    Args:
      round_: rounds done.
      state: a pytree of arrays.
      facts: anything JSON holds.

    Raises:
      CheckpointError: for the checkpoint before, see `wait`.
    """
    self.wait()
    # The next round uses the state up, of which arrays on a CPU are views.
    leaves = [np.array(x) for x in jax.tree.leaves(jax.device_get(state))]
    self._writing = self._thread.submit(
      self._write, round_, leaves, _leaves(state), facts
    )

  def wait(self) -> None:
    """Return when the last checkpoint is committed.

    Raises:
      CheckpointError: the disk is full or refuses; earlier checkpoints and
        nothing half-written are left.
    """
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()

  def _write(
    self,
    round_: int,
    leaves: list[np.ndarray],
    names: dict[str, str],
    facts: dict[str, Any],
  ) -> None:
    record = {
      "round": round_,
      "facts": facts,
      "leaves": names,
      "sha256": [digest(leaf) for leaf in leaves],
    }
    args = self._ocp.args
    items = {_RECORD: args.JsonSave(record)}
    # Orbax refuses arrays without elements; their shapes say it all.
    arrays = {_key(i): leaf for i, leaf in enumerate(leaves) if leaf.size}
    if arrays:
      items["state"] = args.PyTreeSave(arrays)
    unfinished = self._folder / f"{round_}{_UNFINISHED}"
    try:
      for later in self.rounds():
        if later >= round_:
          shutil.rmtree(self._reader.path(later))
      _check_room(self._folder, sum(leaf.nbytes for leaf in leaves))
      self._orbax.save(unfinished, args.Composite(**items))
      write_json(unfinished / SUMS, _sums(unfinished))
      os.rename(unfinished, self._reader.path(round_))
    except Exception as error:  # whatever a full disk makes orbax raise
      self._remove(_UNFINISHED)
      left = self.rounds()
      raise CheckpointError(
        f"The checkpoint of round {round_} could not be written to"
        f" {self._folder}: {_first_line(error)}. "
        + (f"That of round {left[-1]} is intact. " if left else "")
        + "Make room or correct the folder, and run the same command again."
      ) from error
    every = self._snapshot_every
    for old in self.rounds()[: -self._keep]:
      if every is None or old % every:
        shutil.rmtree(self._reader.path(old), ignore_errors=True)
    self._remove(_DAMAGED)
    self.on_commit(round_)

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
        return self._reader.read(round_, like)
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

  def close(self) -> None:
    """Wait for what is being written, and end all threads."""
    self._thread.shutdown()
    self._reader.close()

  def _set_aside(self, round_: int) -> None:
    aside = self._folder / f"{round_}{_DAMAGED}"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(self._reader.path(round_), aside)

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


def check_files(folder: Path, part: str = "") -> None:
  """Raise ValueError or OSError for a file that is not as it was written.

  Args:
    folder: of the checkpoint.
    part: which of its folders; "" for all.
  """
  wanted = json.loads((folder / SUMS).read_bytes())
  wanted = {k: v for k, v in wanted.items() if k.startswith(part)}
  found = {f"{part}/{k}": v for k, v in _sums(folder / part).items()}
  found = {k.removeprefix("/"): v for k, v in found.items()}
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
