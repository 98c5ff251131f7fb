"""Federated data on disk, read piece by piece."""

from __future__ import annotations

import dataclasses
import functools
import mmap
from collections.abc import Mapping

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.federated import FederatedData

_PIECE = 2**13  # rows that are read at once


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredData(FederatedData):
  """Clients whose examples were checked when they were written to the disk.

  Nothing is read when it is made: the arrays are memory-mapped.

  Attributes:
    digest: SHA-256 of the checksums of all that there is, hexadecimal.
    bounds: field -> its least and largest number, of whole numbers, one an
      example.
  """

  digest: str
  bounds: Mapping[str, tuple[int, int]]

  def __post_init__(self) -> None:
    num_examples = validate.arrays("a store", self.examples)
    if self.offsets[0] != 0 or self.offsets[-1] != num_examples:
      raise ValueError(
        f"A store has {num_examples} examples, and offsets to"
        f" {self.offsets[-1]}; write it again."
      )

  def label_range(self, field: str) -> tuple[int, int]:
    """Return the recorded range if there is one, else compute it."""
    return self.bounds.get(field) or super().label_range(field)

  @functools.cached_property
  def in_memory(self) -> FederatedData:
    """The data copied to the host's memory, once."""
    examples = {k: np.array(values) for k, values in self.examples.items()}
    for values in self.examples.values():
      forget(values)
    return dataclasses.replace(self, examples=examples)


def forget(values: np.ndarray) -> None:
  """Release a memory-mapped array's pages from memory; the disk has them."""
  mapped = getattr(values, "_mmap", None)
  if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
    mapped.madvise(mmap.MADV_DONTNEED)


def take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Return these rows; keep no pages of an array on the disk in memory.

  The system maps many pages around each that is read, hence piece by piece.
  """
  if not isinstance(array, np.memmap):
    return array[rows]
  out = np.empty((len(rows), *array.shape[1:]), array.dtype)
  plain = np.asarray(array)
  for first in range(0, len(rows), _PIECE):
    piece = slice(first, first + _PIECE)
    out[piece] = plain[rows[piece]]
    forget(array)
  return out
