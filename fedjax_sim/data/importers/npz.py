"""An `.npz` file with an array that names each example's client, streamed."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fedjax_sim.data.array_files import Member, members_of
from fedjax_sim.data.importers import blocks
from fedjax_sim.data.importers.blocks import (
  Block,
  client_names,
  files_of,
  grouped,
  reading,
  source,
)
from fedjax_sim.data.importers.fields import columns_of


@source
def npz(
  path: str | os.PathLike[str],
  *,
  client: str = "client",
  fields: Mapping[str, str] | None = None,
) -> Iterator[Block]:
  """Read the examples of an `.npz` file, or of a folder of them.

  Nothing is unpickled, and no temporary files are written. An array in Fortran
  order is held in memory.

  Args:
    path: `.npz`, or their folder.
    client: the array that names each example's client, (examples,), texts or
      whole numbers.
    fields: field -> array; None: all arrays but `client`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a file is damaged, lacks an array, or has arrays of other
      lengths or of no numbers or text; names file and array.
  """
  for file in files_of(path, ".npz"):
    with reading(file, ".npz"):
      yield from _file(file, client, fields)


def _file(
  file: Path, client: str, fields: Mapping[str, str] | None
) -> Iterator[Block]:
  with contextlib.ExitStack() as stack:
    archive = stack.enter_context(zipfile.ZipFile(file))
    members = members_of(archive)
    wanted = columns_of(str(file), list(members), client, fields)
    arrays = {
      name: Member(
        f"{file}: array {name!r}",
        stack.enter_context(archive.open(members[name])),
      )
      for name in wanted
    }
    totals = {k: a.shape[0] if a.shape else 0 for k, a in arrays.items()}
    total = totals[client]
    for name, rows in totals.items():
      if rows != total or not arrays[name].shape:
        raise ValueError(
          f"{file}: array {name!r} has shape {arrays[name].shape}, and"
          f" {client!r} {arrays[client].shape}; give each one row an example."
        )
    each = sum(array.row for array in arrays.values())
    rows = max(1, blocks.BLOCK // max(each, 1))
    for first in range(0, total, rows):
      part = {
        k: _texts_as_objects(a.read(min(rows, total - first)))
        for k, a in arrays.items()
      }
      keys = part.pop(client)
      if keys.ndim != 1:
        raise ValueError(
          f"{file}: array {client!r} has shape {arrays[client].shape}; give one"
          " name an example."
        )
      names = client_names(str(file), client, keys.tolist(), first)
      yield grouped(str(file), names, part, fields, first)


def _texts_as_objects(values: np.ndarray) -> np.ndarray:
  return values.astype(object) if values.dtype.kind == "U" else values
