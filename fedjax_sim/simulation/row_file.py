"""A file of records of one size: rows of client states, as they lie on disk.

Records are read and written by `pread` and `pwrite`, into buffers of a few
megabytes: pages of a mapped file would count as memory of the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim.core import PyTree
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.files import UNSUPPORTED, sync_folder

BUFFER = 2**20  # bytes of records that are in memory at a time
FILE = "rows.bin"


class RowsError(FedjaxSimError, RuntimeError):
  """The file of client states is in use, is too short, or is damaged."""

  exit_code = 1


class Layout:
  """How the arrays of a row lie in a record: one after the other.

  Args:
    shapes: of a row; leaves with a shape and a dtype.

  Attributes:
    nbytes: of a record.
  """

  def __init__(self, shapes: PyTree):
    leaves, structure = jax.tree.flatten(shapes)
    self._structure: Any = structure
    self._kinds = [(tuple(x.shape), np.dtype(x.dtype)) for x in leaves]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._kinds]
    self._ends = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
    self.nbytes = int(self._ends[-1])

  def blank(self, count: int) -> PyTree:
    """Return rows of zeros, leaves (count, ...)."""
    rows = [np.zeros((count, *shape), dtype) for shape, dtype in self._kinds]
    return jax.tree.unflatten(self._structure, rows)

  def pack(self, rows: PyTree) -> np.ndarray:
    """Return records of rows, shape=(count, nbytes), uint8.

    Args:
      rows: leaves (count, ...), numpy.
    """
    columns = [_as_bytes(x) for x in self._structure.flatten_up_to(rows)]
    return np.ascontiguousarray(np.concatenate(columns, axis=1))

  def unpack(self, records: np.ndarray, into: PyTree, where: Any) -> None:
    """Put records where their rows belong.

    Args:
      records: as `pack` returns them.
      into: leaves (count, ...), numpy, which are written to.
      where: their places in it, as an index.
    """
    parts = zip(
      self._structure.flatten_up_to(into),
      self._kinds,
      self._ends,
      self._ends[1:],
      strict=False,
    )
    for leaf, (shape, dtype), begin, end in parts:
      column = np.ascontiguousarray(records[:, begin:end])
      leaf[where] = column.view(dtype).reshape(len(records), *shape)


def _as_bytes(x: np.ndarray) -> np.ndarray:
  """Return an array (count, ...) as bytes, shape=(count, bytes), uint8."""
  x = np.ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:]))
  return x.view(np.uint8) if x.size else np.empty((len(x), 0), np.uint8)


def sums_of(records: np.ndarray) -> np.ndarray:
  """Return the CRC32 of each record, shape=(records,), uint32."""
  return np.array([zlib.crc32(record) for record in records], np.uint32)


class RowFile:
  """A file of records, open.

  Args:
    folder: where the file is, made if it is missing; None for a file without a
      name in the folder for temporary files, which goes with the process.
    nbytes: of a record.
    write: whether it is written to; nobody else may do so then.

  Attributes:
    name: of the file, for messages.

  Raises:
    OSError: it cannot be opened.
    RowsError: another process writes to it.
  """

  def __init__(self, folder: Path | None, nbytes: int, *, write: bool = True):
    self._nbytes = nbytes
    if folder is None:
      self._file: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
      self.name = f"a temporary file in {tempfile.gettempdir()}"
      return
    path = folder / FILE
    self.name = str(path)
    if write:
      folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
    handle = os.open(path, flags, 0o666)
    self._file = os.fdopen(handle, "r+b" if write else "rb", buffering=0)
    if write:
      self._lock()
      sync_folder(folder)

  def _lock(self) -> None:
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in UNSUPPORTED:
        return
      self.close()
      raise RowsError(
        f"{self.name}: another run writes to it; wait for its end, or take"
        " another --workdir or Runtime.state_folder."
      ) from error

  def count(self) -> int:
    """Return how many records the file has room for, whole ones."""
    return int(os.fstat(self._file.fileno()).st_size) // self._nbytes

  def read(self, records: np.ndarray) -> np.ndarray:
    """Return records.

    Args:
      records: their numbers, shape=(count,), increasing.

    Returns:
      shape=(count, nbytes), uint8.

    Raises:
      RowsError: the file is shorter.
    """
    found = np.empty((len(records), self._nbytes), np.uint8)
    for first, part in _runs(records, found):
      if not self._filled(part.data.cast("B"), first * self._nbytes):
        raise RowsError(
          f"{self.name} is shorter than it was: record {first} and those after"
          " it are missing; restore the file from a copy, or begin anew in"
          " another --workdir."
        )
    return found

  def _filled(self, view: memoryview, place: int) -> bool:
    while view:
      count = os.preadv(self._file.fileno(), [view], place)
      if not count:
        return False
      view, place = view[count:], place + count
    return True

  def write(self, records: np.ndarray, content: np.ndarray) -> None:
    """Write records.

    Args:
      records: their numbers, shape=(count,), increasing.
      content: shape=(count, nbytes), uint8, contiguous.

    Raises:
      OSError: the disk is full.
    """
    for first, part in _runs(records, content):
      view, place = part.data.cast("B"), first * self._nbytes
      while view:
        count = os.pwrite(self._file.fileno(), view, place)
        view, place = view[count:], place + count

  def sync(self) -> None:
    """Return when all that was written is on the disk."""
    with _unsupported_ignored():
      os.fdatasync(self._file.fileno())

  def close(self) -> None:
    """Close the file."""
    self._file.close()


def _runs(
  records: np.ndarray, content: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
  """Yield neighbors in the file together: the first one's number, all rows."""
  breaks = np.flatnonzero(np.diff(records) != 1) + 1
  begins: Sequence[int] = [0, *breaks.tolist()] if len(records) else []
  for begin, end in zip(begins, [*begins[1:], len(records)], strict=True):
    yield int(records[begin]), content[begin:end]


@contextlib.contextmanager
def _unsupported_ignored() -> Iterator[None]:
  try:
    yield
  except OSError as error:
    if error.errno not in (*UNSUPPORTED, errno.EROFS):
      raise
