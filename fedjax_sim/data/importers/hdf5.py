"""HDF5 as TensorFlow Federated and FedML have it, and as FLUTE does.

TFF: `examples/<client>/<field>`, (examples, ...), as in fed_emnist,
fed_cifar100, fed_shakespeare and stackoverflow. FLUTE: `users`, `num_samples`,
`user_data/<user>/x` and perhaps `user_data/<user>/y` or
`user_data_label/<user>`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.optional import library
from fedjax_sim.data.importers.blocks import (
  Block,
  files_of,
  reading,
  source,
)
from fedjax_sim.data.importers.fields import assigned, chosen, wanted_of
from fedjax_sim.data.importers.isolated import apart
from fedjax_sim.data.leaf_format import Notes, counts_of, has_examples, numbers

_SUFFIXES = (".h5", ".hdf5")


@source
def tff_hdf5(
  path: str | os.PathLike[str], *, fields: Mapping[str, str] | None = None
) -> Iterator[Block]:
  """Read a TFF file, or a folder of them, a client at a time.

  Args:
    path: `.h5` or `.hdf5`, or their folder.
    fields: field -> the file's; see `tables.parquet`; None: all.

  Raises:
    FileNotFoundError: there is no such file.
    ModuleNotFoundError: h5py is not installed.
    ValueError: a file is damaged, or of another layout; names file, client and
      field.
  """
  wanted = None if fields is None else dict(fields)
  yield from _blocks(path, functools.partial(_tff, wanted))


@source
def flute_hdf5(path: str | os.PathLike[str]) -> Iterator[Block]:
  """Read a FLUTE file, or a folder of them, a user at a time.

  Raises:
    FileNotFoundError: there is no such file.
    ModuleNotFoundError: h5py is not installed.
    ValueError: a file is damaged, or contradicts itself; names file and user.
  """
  yield from _blocks(path, _flute)


def _blocks(
  path: str | os.PathLike[str],
  blocks_of: Callable[[Path, Any], Iterator[Block]],
) -> Iterator[Block]:
  library("h5py", "hdf5")
  read = functools.partial(_read, blocks_of)
  yield from apart(files_of(path, *_SUFFIXES), "HDF5", read)


def _read(
  blocks_of: Callable[[Path, Any], Iterator[Block]], file: Path
) -> Iterator[Block]:
  h5py = library("h5py", "hdf5")
  with reading(file, "HDF5"), h5py.File(file, "r") as held:
    yield from blocks_of(file, held)


def _tff(
  fields: Mapping[str, str] | None, file: Path, whole: Any
) -> Iterator[Block]:
  clients = _group(file, whole, "examples")
  for name in clients:
    where = f"{file}: client {name!r}"
    held = _group(where, clients, name)
    wanted = list(held) if fields is None else wanted_of(where, held, fields)
    examples = {k: _values(where, k, held) for k in wanted}
    columns = fields and assigned(where, list(examples), fields)
    examples = chosen(where, examples, fields)
    size = max(map(len, examples.values()), default=0)
    yield Block(str(file), [name], [size], examples, True, columns)


def _flute(file: Path, held: Any) -> Iterator[Block]:
  h5py = library("h5py", "hdf5")
  names, counts = (
    _values(str(file), k, held) for k in ("users", "num_samples")
  )
  if counts.dtype.kind not in "iu":
    raise ValueError(
      f"{file}: num_samples: expected whole numbers, one a user, found"
      f" {counts.dtype}."
    )
  notes = Notes()
  expected = counts_of(str(file), list(map(str, names)), counts.tolist(), notes)
  users = _group(file, held, "user_data")
  has_labels = "user_data_label" in held
  labels = _group(file, held, "user_data_label") if has_labels else {}
  for other in (users, labels):
    for name in other:
      if name not in expected:
        raise ValueError(
          f"{file}: user {name!r} has examples or labels, but is not in"
          " users; expected the same in both."
        )
  for name, count in expected.items():
    where = f"{file}: user {name!r}"
    data = _group(where, users, name)
    examples = {k: _values(where, k, data) for k in data}
    if name in labels:
      inner = isinstance(_get(where, labels, name), h5py.Group)
      parent = _group(where, labels, name) if inner else labels
      examples["y"] = _values(where, "x" if inner else name, parent)
    size, y = len(examples.get("x", ())), examples.get("y")
    if has_examples(where, count, size, None if y is None else len(y), notes):
      yield Block(str(file), [name], [size], examples, whole=True)
  notes.warn()


def _get(where: Path | str, parent: Any, name: str) -> Any:
  """Return what a group holds by this name, or None; refuse links."""
  h5py = library("h5py", "hdf5")
  if "/" in name or not isinstance(
    parent.get(name, getlink=True, default=None), h5py.HardLink | None
  ):
    raise ValueError(
      f"{where}: {name!r} leads elsewhere, perhaps to another file, which is"
      " not read; store it in its place."
    )
  return parent.get(name)


def _group(where: Path | str, parent: Any, name: str) -> Any:
  """Return the group of this name.

  Raises:
    ValueError: the group is missing, or is no group.
  """
  h5py = library("h5py", "hdf5")
  found = _get(where, parent, name)
  if not isinstance(found, h5py.Group):
    kind = "nothing" if found is None else f"a {type(found).__name__}"
    raise ValueError(f"{where}: {name}: expected a group, found {kind}.")
  return found


def _values(where: str, field: str, parent: Any) -> np.ndarray:
  """Read a group's data set, one entry an example; text as `str`.

  Raises:
    ValueError: there is no data set of numbers or text that this file holds.
  """
  h5py = library("h5py", "hdf5")
  with reading(f"{where}: {field}", "HDF5"):
    held = _get(where, parent, field)
    if not isinstance(held, h5py.Dataset) or not held.shape:
      raise ValueError(
        f"{where}: {field}: expected an array, one entry an example."
      )
    if held.external or held.is_virtual:
      raise ValueError(
        f"{where}: {field}: its values are in another file, which is not read;"
        " store them in this one."
      )
    _check_storage(where, field, held)
    if h5py.check_string_dtype(held.dtype):
      texts = np.asarray(held.asstr()[()], object)
      if texts.ndim > 1:  # features that are written as texts, perhaps
        with contextlib.suppress(ValueError):
          return numbers(where, field, texts.tolist())
      return texts
    if held.dtype.kind not in "biuf":
      raise ValueError(
        f"{where}: {field}: expected numbers or text, found {held.dtype}."
      )
    values: np.ndarray = held[()]
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _check_storage(where: str, field: str, held: Any) -> None:
  """Refuse a data set that is larger than what the file stores of it.

  HDF5 would fill in the rest, for hours and in any amount of memory.
  """
  if held.chunks is None:
    expected, found = held.nbytes, held.id.get_storage_size()
  else:
    sides = zip(held.shape, held.chunks, strict=True)
    expected = math.prod(-(-length // chunk) for length, chunk in sides)
    found = held.id.get_num_chunks()
  if found < expected:
    unit = "bytes" if held.chunks is None else "chunks"
    raise ValueError(
      f"{where}: {field}: expected {expected:,} {unit}, and the file has"
      f" {found:,}; it is damaged, or was never filled."
    )
