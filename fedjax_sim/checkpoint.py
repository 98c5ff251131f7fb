"""Checkpoints that are whole or not there, and verified when they are read.

Orbax writes a checkpoint into a temporary folder and renames it, so a kill
leaves the old one or the new one. What it does not notice is a byte that
changed on disk: every leaf's SHA-256 is stored beside it and compared at
restore, and a checkpoint that fails makes way for the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.base import PyTree


class CheckpointError(RuntimeError):
  """A checkpoint could not be written."""


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
  """SHA-256 of an array's dtype, shape and bytes."""
  leaf = np.ascontiguousarray(leaf)
  header = f"{leaf.dtype.str}{leaf.shape}".encode()
  return hashlib.sha256(header + leaf.tobytes()).hexdigest()


def tree_digest(tree: PyTree) -> str:
  """SHA-256 over all leaves of the tree, in order."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    total.update(digest(np.asarray(leaf)).encode())
  return total.hexdigest()


class Checkpoints:
  """The checkpoints of a run, in a folder of their own.

  Args:
    folder: made if it is missing.
    keep: how many of the newest to keep; 2 at least, to fall back.
  """

  def __init__(self, folder: Path, *, keep: int):
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._folder = folder.absolute()
    self._keep = max(2, keep)
    self._manager = self._open()

  def _open(self) -> Any:
    return self._ocp.CheckpointManager(
      self._folder,
      options=self._ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        create=True,
        enable_async_checkpointing=False,
      ),
    )

  def rounds(self) -> list[int]:
    """Rounds of which there is a checkpoint, in order."""
    return sorted(self._manager.all_steps())

  def save(self, round_: int, state: PyTree, facts: dict[str, Any]) -> None:
    """Writes a checkpoint; returns when it is committed.

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
      "facts": facts,
      "facts_sha256": _text_digest(facts),
      "leaves": _names(state),
      "sha256": [digest(leaf) for leaf in leaves],
    }
    args = self._ocp.args
    try:
      self._manager.save(
        round_,
        args=args.Composite(
          state=args.PyTreeSave(dict(zip(_keys(leaves), leaves, strict=True))),
          record=args.JsonSave(record),
        ),
      )
      self._manager.wait_until_finished()
    except Exception as error:
      self._clean(round_)
      before = [r for r in self.rounds() if r < round_]
      left = (
        f"that of round {before[-1]} is intact" if before else "none is left"
      )
      raise CheckpointError(
        f"The checkpoint of round {round_} could not be written to"
        f" {self._folder}: {_first_line(error)}. Of the earlier ones, {left}."
        " Make room or correct the folder, and run the same command again."
      ) from error

  def _clean(self, round_: int) -> None:
    """Removes what a failed save left."""
    with contextlib.suppress(Exception):
      self._manager.close()
    for path in self._folder.glob("*"):
      if path.name == str(round_) or ".orbax-checkpoint-tmp" in path.name:
        shutil.rmtree(path, ignore_errors=True)
    self._manager = self._open()

  def restore(
    self, like: PyTree, warn: Callable[[str], None]
  ) -> Restored | None:
    """The newest checkpoint that is whole; None if there is none.

    Damaged ones are reported and removed, so that their rounds can be
    written again.

    Args:
      like: a state of the same structure, shapes and dtypes.
      warn: is told about damaged checkpoints.
    """
    for round_ in reversed(self.rounds()):
      try:
        return self._read(round_, like)
      except Exception as error:  # whatever a torn file makes orbax raise
        warn(
          f"The checkpoint of round {round_} is damaged"
          f" ({_first_line(error)}); falling back to the one before."
        )
        self._manager.close()
        shutil.rmtree(self._folder / str(round_), ignore_errors=True)
        self._manager = self._open()
    return None

  def _read(self, round_: int, like: PyTree) -> Restored:
    args = self._ocp.args
    record = self._manager.restore(
      round_, args=args.Composite(record=args.JsonRestore())
    )["record"]
    expected = _names(like)
    if record["leaves"] != expected:
      raise ValueError("it holds other leaves than this run's state")
    if _text_digest(record["facts"]) != record["facts_sha256"]:
      raise ValueError("the SHA-256 of its facts differs")
    keys = _keys(expected)
    as_numpy = self._ocp.RestoreArgs(restore_type=np.ndarray)
    stored = self._manager.restore(
      round_,
      args=args.Composite(
        state=args.PyTreeRestore(
          restore_args=dict.fromkeys(keys, as_numpy),
          item=dict.fromkeys(keys, 0),
        )
      ),
    )["state"]
    leaves = [np.asarray(stored[key]) for key in keys]
    for name, leaf, shape, sha in zip(
      expected, leaves, jax.tree.leaves(like), record["sha256"], strict=True
    ):
      if digest(leaf) != sha:
        raise ValueError(f"the SHA-256 of {name} differs")
      if leaf.shape != shape.shape or leaf.dtype != shape.dtype:
        raise ValueError(f"{name} has another shape or dtype than this run's")
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Restored(round_, state, record["facts"])

  def close(self) -> None:
    """Ends orbax's threads."""
    self._manager.close()


def _text_digest(facts: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _names(tree: PyTree) -> list[str]:
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [jax.tree_util.keystr(path) for path, _ in paths]


def _keys(leaves: list[Any]) -> list[str]:
  return [f"leaf{i:05d}" for i in range(len(leaves))]


def _first_line(error: BaseException) -> str:
  text = str(error).strip() or type(error).__name__
  line = text.splitlines()[0]
  return line if len(line) <= 200 else line[:200] + "..."
