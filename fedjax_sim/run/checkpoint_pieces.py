"""The pieces of arrays that each process stores in a checkpoint.

A process writes the bytes of all its pieces into one file, and where each of
them lies into another. No other process has to be there for it, and none has to
read more than the pieces that it needs.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.core.digests import digest
from fedjax_sim.core.files import replace_atomically
from fedjax_sim.distributed.pieces import Pieces, Ranges
from fedjax_sim.reporting import write_json
from fedjax_sim.run.checkpoint_files import (
  pieces_file,
  pieces_record,
  sum_of,
)


class StoredPiece(NamedTuple):
  """A piece of an array in a checkpoint.

  Attributes:
    path: of the file that holds it.
    offset: of its first byte there.
    ranges: where it lies in the array.
    sha256: digest of the piece.
  """

  path: Path
  offset: int
  ranges: Ranges
  sha256: str


def write_pieces(
  checkpoint: Path, process: int, leaves: Sequence[np.ndarray | Pieces]
) -> None:
  """Write a process's pieces, and return when the disk has them.

  They are read back before the record is written, which is thus there only if
  the pieces are.

  Args:
    checkpoint: its folder, which exists.
    process: which one this is, from 0.
    leaves: of the state; those that are no `Pieces` are left out.

  Raises:
    OSError: the disk is full or refuses, or does not give back what was
      written.
  """
  path = pieces_file(checkpoint, process)
  record: list[dict[str, Any]] = []
  total = hashlib.sha256()

  own = [
    (i, ranges, np.ascontiguousarray(piece))
    for i, leaf in enumerate(leaves)
    if isinstance(leaf, Pieces)
    for ranges, piece in leaf.own.items()
  ]

  def write(temporary: Path) -> None:
    with temporary.open("wb") as file:
      for leaf, ranges, piece in own:
        place = {"leaf": leaf, "ranges": ranges, "offset": file.tell()}
        record.append({**place, "sha256": digest(piece)})
        content = piece.reshape(-1).view(np.uint8).data
        total.update(content)
        file.write(content)

  replace_atomically(path, write)
  if sum_of(path) != total.hexdigest():
    raise OSError(errno.EIO, f"{path} does not hold what was written to it")
  said = {"sha256": total.hexdigest(), "pieces": record}
  write_json(pieces_record(checkpoint, process), said)


def stored_pieces(
  checkpoint: Path, processes: int
) -> dict[int, list[StoredPiece]]:
  """Return the pieces that a checkpoint has of each leaf.

  Args:
    checkpoint: its folder.
    processes: number of those that wrote it.

  Raises:
    ValueError, KeyError, OSError: a record is damaged or missing.
  """
  found: dict[int, list[StoredPiece]] = {}
  for process in range(processes):
    path = pieces_file(checkpoint, process)
    record = json.loads(pieces_record(checkpoint, process).read_bytes())
    for facts in record["pieces"]:
      ranges = tuple((begin, end) for begin, end in facts["ranges"])
      stored = StoredPiece(path, facts["offset"], ranges, facts["sha256"])
      found.setdefault(facts["leaf"], []).append(stored)
  return found


def read_piece(stored: StoredPiece, dtype: np.dtype) -> np.ndarray:
  """Return a piece, verified.

  Args:
    stored: where it is.
    dtype: of the array.

  Raises:
    ValueError: its SHA-256 differs.
    OSError: it cannot be read.
  """
  shape = [end - begin for begin, end in stored.ranges]
  size = int(np.prod(shape)) * dtype.itemsize
  content = np.fromfile(stored.path, np.uint8, size, offset=stored.offset)
  if len(content) == size:
    piece = content.view(dtype).reshape(shape)
    if digest(piece) == stored.sha256:
      return piece
  raise ValueError(
    f"the SHA-256 of a piece in {stored.path.name} differs, at byte"
    f" {stored.offset}"
  )
