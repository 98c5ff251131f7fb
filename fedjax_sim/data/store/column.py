"""One array of a client store, written as it grows, with its checksums."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedjax_sim.data.stored import forget

BLOCK = 2**24  # bytes that share a checksum
CHUNK = 2**26  # bytes that are sorted at once


class Column:
  """One array on the disk that grows by its first axis."""

  def __init__(self, path: Path, like: np.ndarray):
    self.path, self.example = path, like[:0].copy()
    self.rows = 0
    self._file: BinaryIO = path.open("wb")
    self._sums = Sums()
    self._write_header()
    self._begin = self._file.tell()

  def _write_header(self) -> None:
    shape = (self.rows, *self.example.shape[1:])
    self._file.write(header(self.example.dtype, shape))

  def append(self, values: np.ndarray) -> None:
    """Write more rows."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    self._file.write(data)
    self._sums.update(data)
    self.rows += len(values)

  def finish(self) -> None:
    """Write how many rows there are, and close the file."""
    self._file.seek(0)
    self._write_header()
    assert self._file.tell() == self._begin
    self._file.flush()
    os.fsync(self._file.fileno())
    self.close()

  def close(self) -> None:
    """Close the file."""
    self._file.close()

  def reorder(self, destinations: np.ndarray, counts: np.ndarray) -> None:
    """Move segments of rows to new places.

    Args:
      destinations: the first row of each segment's new place, in the order in
        which the segments were written.
      counts: how many rows each segment has.
    """
    source = np.load(self.path, mmap_mode="r")
    temporary = self.path.with_suffix(".sorted.npy")
    with temporary.open("wb") as file:
      # A full disk would be a signal, not an error, once it is mapped.
      os.posix_fallocate(file.fileno(), 0, self.path.stat().st_size)
      file.write(header(source.dtype, source.shape))
    target = np.load(temporary, mmap_mode="r+")
    each = max(1, source[:1].nbytes)
    ends = np.cumsum(counts)
    pieces = np.searchsorted(
      ends, np.arange(0, ends[-1], max(1, CHUNK // each))
    )
    edges = np.unique(np.append(pieces, len(counts)))
    for first, last in itertools.pairwise(edges.tolist()):
      begin, end = ends[first] - counts[first], ends[last - 1]
      shift = destinations[first:last] - (ends - counts)[first:last]
      rows = np.arange(begin, end) + np.repeat(shift, counts[first:last])
      target[rows] = source[begin:end]
      forget(source)
      target.flush()
      forget(target)
    del source, target
    with temporary.open("rb+") as file:
      os.fsync(file.fileno())
    temporary.replace(self.path)
    self._sums = sums_of(self.path, self._begin)

  def facts(self) -> dict[str, Any]:
    """Return the column's entry in `store.json`."""
    return {
      "dtype": self.example.dtype.str,
      "shape": [self.rows, *self.example.shape[1:]],
      "begin": self._begin,
      "sha256": self._sums.digests(),
    }


def header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
  """Return the header of a `.npy` file, as long for any number of rows."""
  text = io.BytesIO()
  facts = {"descr": dtype.str, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(text, facts)
  return text.getvalue()


class Sums:
  """SHA-256 of every `BLOCK` bytes."""

  def __init__(self) -> None:
    self._done: list[str] = []
    self._current, self._filled = hashlib.sha256(), 0

  def update(self, data: memoryview) -> None:
    """Add more bytes."""
    while len(data):
      part = data[: BLOCK - self._filled]
      self._current.update(part)
      self._filled += len(part)
      data = data[len(part) :]
      if self._filled == BLOCK:
        self._done.append(self._current.hexdigest())
        self._current, self._filled = hashlib.sha256(), 0

  def digests(self) -> list[str]:
    """Return the checksums so far, hexadecimal."""
    last = [self._current.hexdigest()] if self._filled else []
    return self._done + last


def sums_of(path: Path, begin: int) -> Sums:
  """Return the checksums of a file's bytes from `begin` on."""
  sums = Sums()
  with path.open("rb") as file:
    file.seek(begin)
    while data := file.read(BLOCK):
      sums.update(memoryview(data))
  return sums
