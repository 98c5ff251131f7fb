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
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim.core import PyTree
from fedjax_sim.core.digests import digest
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.files import UNSUPPORTED
from fedjax_sim.distributed import processes
from fedjax_sim.distributed.pieces import Pieces, Wanted
from fedjax_sim.reporting import write_json
from fedjax_sim.run.checkpoint_files import (
  DAMAGED,
  RECORD,
  SUMS,
  UNFINISHED,
  first_line,
  key,
  pieces_file,
  pieces_record,
  sums_of,
)
from fedjax_sim.run.checkpoint_pieces import write_pieces
from fedjax_sim.run.checkpoint_reader import (
  CheckpointReader,
  Restored,
  StateChangedError,
  leaves_of,
)

_OVERHEAD = 2**20  # bytes, at most, that a checkpoint has besides its leaves
_VISIBLE_SECONDS = 60.0  # until a network file system shows others' files
_WHOLE, _DAMAGED, _ENDS = 0.0, 1.0, 2.0  # what became of reading a checkpoint


class CheckpointError(FedjaxSimError, RuntimeError):
  """A checkpoint could not be written, or none is whole."""

  exit_code = 1


class Checkpoints:
  """The checkpoints of a run, in a folder of their own.

  Args:
    folder: made if it is missing; nobody else may write there at the same time.
    keep: how many of the newest to keep; 2 at least, to fall back.
    occasion: of a meeting of all processes, if all have such an object, of the
      same folder, and each writes its pieces of the arrays that lie spread over
      them; None if only process 0 has one.
    snapshot_every: those of its multiples, with round 0, are kept besides; None
      for none.

  Attributes:
    shared: whether all processes have such an object.
    on_commit: is given the round of each checkpoint when it is committed and
      those before it are pruned, by the thread that writes.
  """

  on_commit: Callable[[int], None]

  def __init__(
    self,
    folder: Path,
    *,
    keep: int,
    snapshot_every: int | None = None,
    occasion: str | None = None,
  ):
    self._reader = CheckpointReader(folder)
    self._ocp, self._orbax = self._reader.ocp, self._reader.orbax
    self._folder = folder.absolute()
    self._keep = max(2, keep)
    self._snapshot_every = snapshot_every
    self._occasion = occasion
    self.shared = occasion is not None
    self._saves = 0
    if processes.is_first() or not self.shared:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._remove(UNFINISHED)
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
      state: a pytree of arrays; where all processes write, `Pieces` of those
        that are spread over them.
      facts: anything JSON holds.

    Raises:
      CheckpointError: for the checkpoint before, see `wait`.
    """
    self.wait()
    # The next round uses the state up, of which arrays on a CPU are views.
    leaves = [_copied(x) for x in jax.tree.leaves(jax.device_get(state))]
    self._saves += 1
    self._writing = self._thread.submit(
      self._write, self._saves, round_, leaves, leaves_of(state), facts
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
    number: int,
    round_: int,
    leaves: list[np.ndarray | Pieces],
    names: dict[str, str],
    facts: dict[str, Any],
  ) -> None:
    """Write and commit a checkpoint, or this process's part of it."""
    meeting = processes.Meeting(f"{self._occasion}/checkpoint/{number}")
    unfinished = self._folder / f"{round_}{UNFINISHED}"
    if self.shared and not processes.is_first():
      self._write_share(meeting, unfinished, leaves)
      return
    try:
      self._begin(round_, leaves)
      self._write_whole(unfinished, round_, leaves, names, facts)
      if self.shared:
        self._write_together(meeting, unfinished, leaves)
      write_json(unfinished / SUMS, sums_of(unfinished))
      # Of a folder without a file, which is no checkpoint.
      shutil.rmtree(self._reader.path(round_), ignore_errors=True)
      os.rename(unfinished, self._reader.path(round_))
    except Exception as error:  # whatever a full disk makes orbax raise
      self._remove(UNFINISHED)
      left = self._reader.rounds()
      text = (
        f"The checkpoint of round {round_} could not be written to"
        f" {self._folder}: {first_line(error)}. "
        + (f"That of round {left[-1]} is intact. " if left else "")
        + "Make room or correct the folder, and run the same command again."
      )
      if self.shared:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          meeting.say("begun", text)  # unless they have begun
        meeting.say("ended", text)
      raise CheckpointError(text) from error
    if self.shared:
      meeting.say("ended", "")
    self._prune()
    self.on_commit(round_)

  def _begin(self, round_: int, leaves: Sequence[np.ndarray | Pieces]) -> None:
    """Remove checkpoints of later rounds, and look whether there is room."""
    for later in self._reader.rounds():
      if later >= round_:
        shutil.rmtree(self._reader.path(later))
    _check_room(self._folder, sum(leaf.nbytes for leaf in leaves))

  def _write_whole(
    self,
    unfinished: Path,
    round_: int,
    leaves: Sequence[np.ndarray | Pieces],
    names: dict[str, str],
    facts: dict[str, Any],
  ) -> None:
    """Write what is known of the state, and the arrays that are whole."""
    whole = {i: x for i, x in enumerate(leaves) if isinstance(x, np.ndarray)}
    record = {
      "round": round_,
      "facts": facts,
      "leaves": names,
      "sha256": [
        digest(whole[i]) if i in whole else None for i in range(len(leaves))
      ],
      "processes": jax.process_count() if self.shared else 0,
    }
    # Orbax refuses arrays without elements; their shapes say it all.
    arrays = {key(i): leaf for i, leaf in whole.items() if leaf.size}
    args = self._ocp.args
    items = {RECORD: args.JsonSave(record)}
    if arrays:
      items["state"] = args.PyTreeSave(arrays)
    self._orbax.save(unfinished, args.Composite(**items))

  def _write_together(
    self,
    meeting: processes.Meeting,
    unfinished: Path,
    leaves: Sequence[np.ndarray | Pieces],
  ) -> None:
    """Let all processes write their pieces, and write those of process 0."""
    meeting.say("begun", "")
    failures = []
    try:
      write_pieces(unfinished, 0, leaves)
    except Exception as error:
      failures.append(error)
    for process in range(1, jax.process_count()):
      if told := meeting.hear(f"done/{process}"):
        failures.append(OSError(f"process {process}: {told}"))
    if failures:
      raise failures[0]
    for process in range(1, jax.process_count()):
      _await(pieces_file(unfinished, process))
      _await(pieces_record(unfinished, process))

  def _write_share(
    self,
    meeting: processes.Meeting,
    unfinished: Path,
    leaves: Sequence[np.ndarray | Pieces],
  ) -> None:
    """Write the pieces of a process that is not the first one."""
    if told := meeting.hear("begun"):
      raise CheckpointError(told)
    failure = ""
    try:
      _await(unfinished)
      write_pieces(unfinished, jax.process_index(), leaves)
    except Exception as error:
      failure = first_line(error)
    meeting.say(f"done/{jax.process_index()}", failure)
    if told := meeting.hear("ended"):
      raise CheckpointError(told)

  def _prune(self) -> None:
    """Remove the checkpoints that are not to be kept."""
    every = self._snapshot_every
    for old in self._reader.rounds()[: -self._keep]:
      if every is None or old % every:
        shutil.rmtree(self._reader.path(old), ignore_errors=True)
    self._remove(DAMAGED)

  def each(
    self, like: PyTree, wanted: Callable[[PyTree], PyTree]
  ) -> Iterator[tuple[int, PyTree]]:
    """Yield a part of every checkpoint that can be read, with its round.

    Args:
      like: a state of the same structure, shapes and dtypes.
      wanted: state -> the part of it.
    """
    for round_ in self.rounds():
      try:
        found = self._reader.read(round_, like, wanted)
      except (MemoryError, PermissionError):
        raise
      except Exception:  # whatever a torn file makes orbax raise
        continue  # `restore` would not read it, either
      yield round_, found.state

  def restore(
    self,
    like: PyTree,
    warn: Callable[[str], None],
    ranges: Sequence[Wanted] | None = None,
  ) -> Restored | None:
    """Return the newest whole checkpoint; None if there is none at all.

    Damaged ones that are newer are set aside under another name until the next
    `save`.

    Args:
      like: a state of the same structure, shapes and dtypes.
      warn: is told about damaged checkpoints.
      ranges: where all processes write: for each leaf the pieces that this one
        needs. All of them call it then, and agree on the checkpoint.

    Raises:
      CheckpointError: all checkpoints are damaged; they stay as they are.
      StateChangedError: the newest whole checkpoint is of another state.
      PeerError: another process cannot read it.
    """
    rounds = self.rounds()
    if self.shared:
      rounds = processes.from_first(self._reader.rounds)
    damaged: dict[int, str] = {}
    for round_ in reversed(rounds):
      found, problem = self._read(round_, like, ranges)
      if found is None:
        damaged[round_] = problem
        continue
      for other, problem in damaged.items():
        if problem:  # of this process; another one warns of its own
          warn(
            f"The checkpoint of round {other} is damaged ({problem}); falling"
            f" back to that of round {round_}."
          )
        if processes.is_first() or not self.shared:
          self._set_aside(other)
      return found
    self._refuse_damaged(damaged)
    return None

  def _read(
    self, round_: int, like: PyTree, ranges: Sequence[Wanted] | None
  ) -> tuple[Restored | None, str]:
    """Return a checkpoint that is whole for all processes.

    Returns:
      The checkpoint; and None, and what this process finds wrong with it.
    """
    found, problem = None, ""
    try:
      found = self._reader.read(round_, like, ranges=ranges)
    except (MemoryError, PermissionError, StateChangedError):
      if not self.shared:
        raise
      processes.greatest(_ENDS)
      raise
    except Exception as error:  # whatever a torn file makes orbax raise
      problem = first_line(error)
    worst = _DAMAGED if problem else _WHOLE
    if self.shared:
      (worst,) = processes.greatest(worst)
    if worst == _ENDS:
      raise processes.PeerError(
        f"Another process cannot read the checkpoint of round {round_}."
      )
    return (found if worst == _WHOLE else None), problem

  def _refuse_damaged(self, damaged: Mapping[int, str]) -> None:
    """Refuse to begin anew, and so to remove checkpoints that can be mended.

    Args:
      damaged: round -> what this process finds wrong with its checkpoint.

    Raises:
      CheckpointError: there are damaged checkpoints.
    """
    listed = [
      f"round {round_}: {problem or 'another process cannot read it'}"
      for round_, problem in damaged.items()
    ]
    listed += [f"{path.name} was set aside" for path in self._asides()]
    if listed:
      raise CheckpointError(
        f"No checkpoint in {self._folder} is whole ({'; '.join(listed[:3])})."
        " Restore the files from a copy, or begin anew in another --workdir."
      )

  def close(self) -> None:
    """Wait for what is being written, and end all threads."""
    self._thread.shutdown()
    self._reader.close()

  def _set_aside(self, round_: int) -> None:
    aside = self._folder / f"{round_}{DAMAGED}"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(self._reader.path(round_), aside)

  def _asides(self) -> list[Path]:
    """Return the damaged checkpoints that were set aside."""
    return sorted(self._folder.glob(f"*{DAMAGED}"))

  def _remove(self, mark: str) -> None:
    """Remove what has the mark in its name."""
    for path in self._folder.glob(f"*{mark}*"):
      with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copied(leaf: Any) -> np.ndarray | Pieces:
  if isinstance(leaf, Pieces):
    own = {ranges: np.array(piece) for ranges, piece in leaf.own.items()}
    return Pieces(leaf.shape, leaf.dtype, own)
  return np.array(leaf)


def _await(path: Path) -> None:
  """Wait until another process's file or folder is seen here."""
  end = time.monotonic() + _VISIBLE_SECONDS
  while not path.exists():
    if time.monotonic() > end:
      raise OSError(errno.ENOENT, f"{path} of another process does not appear")
    time.sleep(0.02)


def _check_room(folder: Path, size: int) -> None:
  """Raise OSError if the disk has no room for a checkpoint of `size` bytes.

  Orbax would report it, too, but with a traceback for every file.
  """
  path = folder / f"room{UNFINISHED}"
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
