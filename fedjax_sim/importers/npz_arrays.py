"""An `.npz` file with an array that names each example's client, streamed."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedjax_sim.importers import blocks
from fedjax_sim.importers.blocks import (
  Block,
  client_names,
  files_of,
  grouped,
  reading,
  source,
)
from fedjax_sim.importers.fields import columns_of


@source
def npz(
  path: str | os.PathLike[str],
  *,
  client: str = "client",
  fields: Mapping[str, str] | None = None,
) -> Iterator[Block]:
  """Examples of an `.npz` file, or of a folder of them.

  Nothing is unpickled, and nothing of it is written to files of its own.

  Args:
    path: `.npz`, or their folder.
    client: the array that names each example's client, (examples,), texts or
      whole numbers.
    fields: field -> array; None: all arrays but `client`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a file is damaged, lacks an array, or has arrays of other
      lengths; names file and array.
  """
  for file in files_of(path, ".npz"):
    with reading(file, ".npz"):
      yield from _file(file, client, fields)


def _file(
  file: Path, client: str, fields: Mapping[str, str] | None
) -> Iterator[Block]:
  with contextlib.ExitStack() as stack:
    archive = stack.enter_context(zipfile.ZipFile(file))
    members = {
      name.removesuffix(".npy"): name
      for name in archive.namelist()
      if name.endswith(".npy")
    }
    wanted = columns_of(str(file), list(members), client, fields)
    arrays = {
      name: _Array(
        f"{file}: array {name!r}",
        stack.enter_context(archive.open(members[name])),
      )
      for name in wanted
    }
    total = arrays[client].shape[0]
    for name, array in arrays.items():
      if array.shape[0] != total:
        raise ValueError(
          f"{file}: array {name!r} has {array.shape[0]} rows, and {client!r}"
          f" {total}; give each one an example."
        )
    each = sum(array.row for array in arrays.values())
    rows = max(1, blocks.BLOCK // max(each, 1))
    for first in range(0, total, rows):
      part = {k: a.read(min(rows, total - first)) for k, a in arrays.items()}
      keys = part.pop(client)
      if keys.ndim != 1:
        raise ValueError(
          f"{file}: array {client!r} has shape {arrays[client].shape}; give one"
          " name an example."
        )
      names = client_names(str(file), client, keys.tolist(), first)
      yield grouped(str(file), names, part, fields, first)


class _Array:
  """A `.npy` member, read row after row."""

  def __init__(self, where: str, stream: IO[bytes]):
    self._where, self._stream = where, stream
    read: Any = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(stream))
    if read is None:
      raise ValueError(f"{where} is of an unknown version of .npy.")
    self.shape, fortran, self._dtype = read(stream)
    if self._dtype.hasobject or self._dtype.kind not in "biufUS":
      raise ValueError(
        f"{where} has dtype {self._dtype}; give numbers, or text, that need no"
        " unpickling."
      )
    if not self.shape or (fortran and len(self.shape) > 1):
      raise ValueError(
        f"{where} has shape {self.shape}{' in Fortran order' * fortran}; give"
        " one row an example, in C order."
      )
    self.row = self._dtype.itemsize * int(np.prod(self.shape[1:], dtype=object))

  def read(self, rows: int) -> np.ndarray:
    """The next rows; text as `str`, dtype object unless it is of keys."""
    data = self._stream.read(rows * self.row)
    if len(data) != rows * self.row:
      raise ValueError(f"{self._where} ends before its last row.")
    values = np.frombuffer(data, self._dtype).reshape(rows, *self.shape[1:])
    if self._dtype.kind == "S":
      values = np.strings.decode(values, "utf-8")
    if values.dtype.kind == "U":
      return values.astype(object)
    return values.astype(values.dtype.newbyteorder("="), copy=False)
