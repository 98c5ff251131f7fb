"""Read checkpoints: verified, whole or in part, by one process or by many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import PyTree
from fedjax_sim.core.digests import digest
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.distributed.pieces import (
  Pieces,
  Ranges,
  Wanted,
  assemble,
  cut,
  is_empty,
  overlap,
)
from fedjax_sim.run.checkpoint_files import RECORD, check_files, key, rounds_in
from fedjax_sim.run.checkpoint_pieces import (
  StoredPiece,
  read_piece,
  stored_pieces,
)


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

  def facts(self, round_: int) -> dict[str, Any]:
    """Return what was stored with the state of a round, verified.

    Raises:
      Exception: it is damaged or gone, whatever makes orbax raise.
    """
    check_files(self.path(round_), RECORD)
    record = self._load(round_, RECORD, self.ocp.args.JsonRestore())
    return dict(record["facts"])

  def read(
    self,
    round_: int,
    like: PyTree,
    wanted: Callable[[PyTree], PyTree] | None = None,
    ranges: Sequence[Wanted] | None = None,
  ) -> Restored:
    """Read the checkpoint of a round, verified.

    Args:
      round_: rounds done.
      like: a state of the same structure, shapes and dtypes.
      wanted: state -> the part of it that is read; None: all of it, and the
        files are verified before orbax reads them.
      ranges: for each leaf the pieces that this process needs, whose leaves are
        then `Pieces`; all processes have to call it, and share the work of
        verifying. None: arrays are whole, and put together from pieces.

    Returns:
      The checkpoint, with that part as its state.

    Raises:
      StateChangedError: it is of another state.
      Exception: it is damaged or gone, whatever makes orbax raise.
    """
    args = self.ocp.args
    folder = self.path(round_)
    share = (0, 1)
    if ranges is not None:
      share = jax.process_index(), jax.process_count()
    check_files(folder, "" if wanted is None else RECORD, share)
    record = self._load(round_, RECORD, args.JsonRestore())
    if record["round"] != round_:
      raise ValueError(f"it is of round {record['round']}")
    _check_leaves(round_, record["leaves"], leaves_of(like))
    shapes = jax.tree.leaves(like)
    structure = jax.tree.structure(like)
    part = lambda leaves: jax.tree.unflatten(structure, leaves)
    if wanted is not None:
      part = lambda leaves: wanted(jax.tree.unflatten(structure, leaves))
    places = jax.tree.leaves(part(range(len(shapes))))
    spread = {i for i in places if record["sha256"][i] is None}
    whole = [i for i in places if i not in spread]
    arrays = {}
    if keys := [key(i) for i in whole if math.prod(shapes[i].shape)]:
      partial = wanted is not None
      arrays = self._load(round_, "state", self._arrays(keys, partial))
    names = list(record["leaves"])
    leaves: list[Any] = [None] * len(shapes)
    for i in whole:
      empty = np.zeros(shapes[i].shape, shapes[i].dtype)
      leaf = np.asarray(arrays.get(key(i), empty))
      if digest(leaf) != record["sha256"][i]:
        raise ValueError(f"the SHA-256 of {names[i]} differs")
      leaves[i] = _cut(leaf, None if ranges is None else ranges[i].ranges)
    if spread:
      stored = stored_pieces(folder, record["processes"])
      for i in spread:
        own = None if ranges is None else ranges[i].ranges
        leaves[i] = _joined(shapes[i], stored.get(i, []), own)
    return Restored(round_, part(leaves), record["facts"])

  def _arrays(self, keys: Sequence[str], partial: bool) -> Any:
    """Return how to restore arrays, to numpy."""
    as_numpy = self.ocp.RestoreArgs(restore_type=np.ndarray)
    return self.ocp.args.PyTreeRestore(
      item=dict.fromkeys(keys, 0),
      restore_args=dict.fromkeys(keys, as_numpy),
      partial_restore=partial,
    )

  def _load(self, round_: int, item: str, how: Any) -> Any:
    composite = self.ocp.args.Composite(**{item: how})
    return self.orbax.restore(self.path(round_), composite)[item]

  def close(self) -> None:
    """End orbax's threads."""
    self.orbax.close()

  def path(self, round_: int) -> Path:
    """Return the folder of a checkpoint."""
    return self._folder / str(round_)


def leaves_of(tree: PyTree) -> dict[str, str]:
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


def _cut(
  leaf: np.ndarray, ranges: Sequence[Ranges] | None
) -> np.ndarray | Pieces:
  """Return the pieces of a whole array; None: all of it."""
  if ranges is None:
    return leaf
  own = {r: np.array(cut(leaf, r)) for r in ranges}
  return Pieces(leaf.shape, leaf.dtype, own)


def _joined(
  shape: Any,
  stored: Sequence[StoredPiece],
  wanted: Sequence[Ranges] | None,
) -> np.ndarray | Pieces:
  """Return an array, or its pieces, put together from what overlaps them."""
  dtype = np.dtype(shape.dtype)
  everything = tuple((0, n) for n in shape.shape)
  own: dict[Ranges, np.ndarray] = {}
  for ranges in [everything] if wanted is None else wanted:
    needed = [s for s in stored if not is_empty(overlap(s.ranges, ranges))]
    parts = ((s.ranges, read_piece(s, dtype)) for s in needed)
    own[ranges] = assemble(ranges, dtype, parts)
  if wanted is None:
    return own[everything]
  return Pieces(shape.shape, dtype, own)
