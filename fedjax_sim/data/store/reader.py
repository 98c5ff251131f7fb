"""Opens a client store: memory-mapped examples, checked when written.

Opening looks at the sizes of files and at nothing in them, but for central
examples and, with a split "seen", names. So it takes as long for a million
clients as for a hundred. `verify` reads all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.data.batch_steps import input_shape
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import Names
from fedjax_sim.data.location import local, locate
from fedjax_sim.data.splits import Clients, make_dataset
from fedjax_sim.data.store import column, format
from fedjax_sim.data.stored import StoredData

_TABLES = ("offsets", "names", "name_ends")


class StoreError(FedjaxSimError, ValueError):
  """A store is damaged, incomplete, or of another version."""


class StoredNames(Sequence[str]):
  """Clients' names, each read from the disk when it is used."""

  def __init__(self, letters: np.ndarray, ends: np.ndarray):
    self._letters, self._ends = letters, ends

  def __len__(self) -> int:
    return len(self._ends)

  @overload
  def __getitem__(self, index: int) -> str: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[str, ...]: ...
  def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
    if isinstance(index, slice):
      return tuple(self[i] for i in range(*index.indices(len(self))))
    i = range(len(self))[index]
    begin = self._ends[i - 1] if i else 0
    return self._letters[begin : self._ends[i]].tobytes().decode()

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, StoredNames):
      return NotImplemented
    return np.array_equal(self._ends, other._ends) and np.array_equal(
      self._letters, other._letters
    )

  __hash__ = None  # type: ignore[assignment]


def open_store(path: str | os.PathLike[str]) -> FederatedDataset:
  """Open a store as a data set, memory-mapped.

  Raises:
    FileNotFoundError: there is no store.
    StoreError: it is of another version, or a file is not as it was written;
      names the file.
  """
  folder = local(path)
  facts = facts_of(folder)
  splits = {
    name: _split(folder / name, split)
    for name, split in facts["splits"].items()
  }
  train = splits["train"]
  test, server = (
    dict(splits[name].examples) if name in splits else None
    for name in ("test", "server")
  )
  num_classes = facts["num_classes"]
  prepare = format.PREPARE[facts["prepare"]]
  if num_classes is None:
    tops = [s.bounds["y"][1] for s in splits.values() if "y" in s.bounds]
    num_classes = 1 + max(tops, default=-1)
  return FederatedDataset(
    name=facts["name"],
    train=train,
    num_classes=num_classes,
    example_shape=input_shape(prepare, train.examples),
    seen=splits.get("seen"),
    splits={k: splits[k] for k in format.FURTHER if k in splits},
    unseen=splits.get("unseen"),
    prepare=prepare,
    test=test,
    server=server,
  )


def vocabulary_of(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
  """Return what a store's ids of text stand for; see `data.importers.text`.

  Raises:
    FileNotFoundError: there is no store.
    StoreError: it is of another version, or damaged.
  """
  held = facts_of(local(path)).get("vocabulary")
  return None if held is None else tuple(held)


def load_store(
  *,
  path: str | os.PathLike[str] | None = None,
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Load a client store, memory-mapped.

  Splits that are made here copy the examples into memory.

  Args:
    path: the store's folder; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    heldout_fraction: see `make_dataset`; not where the store has a split of
      train's clients.
    unseen_clients: see `make_dataset`; not where the store has "unseen".
    min_examples: clients with fewer are left out.
    seed: of the splits.

  Raises:
    FileNotFoundError: there is no store.
    TypeError, ValueError: it is damaged, or an option is refused.
  """
  data = open_store(locate(path))
  if not (heldout_fraction or unseen_clients or min_examples != 1):
    return data
  aligned = [data.seen, *data.splits.values()]
  for field, wanted, parts in (
    ("heldout_fraction", heldout_fraction, aligned),
    ("unseen_clients", unseen_clients, [*aligned, data.unseen]),
    ("min_examples", min_examples != 1, aligned),
  ):
    if wanted and any(part is not None for part in parts):
      raise ValueError(
        f"data.{field} would split clients that the store at {path} has split"
        " already; unset it."
      )
  made = make_dataset(
    data.name,
    data.train,
    num_classes=data.num_classes,
    test=data.test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=data.prepare,
  )
  unseen = data.unseen if made.unseen is None else made.unseen
  return dataclasses.replace(made, unseen=unseen, server=data.server)


def verify(path: str | os.PathLike[str]) -> None:
  """Read all of a store and compare it with its checksums.

  Args:
    path: the store's folder.

  Raises:
    StoreError: they differ; names the file and, of examples, the clients.
  """
  folder = local(path)
  facts = facts_of(folder)
  for name, split in facts["splits"].items():
    _split(folder / name, split)  # all files are there, and as long
    offsets = np.load(folder / name / "offsets.npy", mmap_mode="r")
    for file, said in split["files"].items():
      found = column.sums_of(folder / name / file, said["begin"]).digests()
      for i, (one, other) in enumerate(zip(found, said["sha256"], strict=True)):
        if one != other:
          where = f"{folder / name / file}: bytes {i * facts['block']} and on"
          if file.startswith("fields/"):
            where += _clients_of(offsets, said, i * facts["block"], facts)
          raise StoreError(
            f"{where} are not those that were written: the checksum differs."
            " Restore the file, or write the store again."
          )
      if file == "offsets.npy" and (np.diff(offsets) < 0).any():
        raise StoreError(f"{folder / name / file} falls; restore the file.")


def _clients_of(
  offsets: np.ndarray,
  said: Mapping[str, Any],
  begin: int,
  facts: Mapping[str, Any],
) -> str:
  """Return the clients of a damaged block, in words."""
  each = np.dtype(said["dtype"]).itemsize * int(np.prod(said["shape"][1:]))
  rows = [begin // each, (begin + facts["block"] - 1) // each]
  rows = [min(row, said["shape"][0] - 1) for row in rows]
  first, last = np.searchsorted(offsets, rows, side="right") - 1
  return f" (field {said['field']!r}, clients {first} to {last})"


def facts_of(folder: Path) -> dict[str, Any]:
  """Return what `store.json` holds, checked.

  Raises:
    FileNotFoundError: there is no `store.json`.
    StoreError: it is of another version, or damaged.
  """
  file = folder / "store.json"
  if not file.is_file():
    raise FileNotFoundError(
      f"{folder} is no store: it holds no store.json. Give a folder that"
      " StoreWriter, or `fedjax-sim data import`, has written."
    )
  try:
    facts = json.loads(file.read_bytes())
    if facts["format"] != format.FORMAT:
      raise StoreError(f"{file} is of no store: format={facts['format']!r}.")
    if facts["version"] != format.VERSION:
      raise StoreError(
        f"{file} is of version {facts['version']!r}, and this program reads"
        f" {format.VERSION}; write the store again."
      )
    if facts["sha256"] != format.seal(facts):
      raise StoreError(
        f"{file} is not as it was written: its checksum differs. Restore it, or"
        " write the store again."
      )
    for split_name, split in facts["splits"].items():
      validate.one_of("split", split_name, format.SPLITS)
      for name, said in split["files"].items():
        if not format.FILE.fullmatch(name):
          raise StoreError(f"{file} names {name!r}, which is no store's file.")
        said["field"], said["shape"] = Path(name).stem, tuple(said["shape"])
        _ = said["dtype"], said["begin"], said["sha256"]
    _ = facts["splits"]["train"]["files"], facts["num_classes"], facts["name"]
    _ = format.PREPARE[facts["prepare"]]
  except StoreError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise StoreError(
      f"{file} is damaged ({error!r}); restore it, or write the store again."
    ) from error
  return dict(facts)


def _split(folder: Path, split: Mapping[str, Any]) -> StoredData:
  arrays = {
    name: _mapped(folder / name, said) for name, said in split["files"].items()
  }
  fields = {
    Path(name).stem: values
    for name, values in arrays.items()
    if name.startswith("fields/")
  }
  offsets, letters, ends = (arrays[f"{table}.npy"] for table in _TABLES)
  names: Names = StoredNames(letters, ends)
  sums = [said["sha256"] for said in split["files"].values()]
  try:
    return StoredData(
      examples=fields,
      offsets=np.asarray(offsets),
      names=names,
      allow_empty=True,
      digest=hashlib.sha256(repr(sums).encode()).hexdigest(),
      bounds={k: (int(a), int(b)) for k, (a, b) in split["bounds"].items()},
    )
  except ValueError as error:
    raise StoreError(f"{folder} is damaged: {error}") from error


def _mapped(file: Path, said: Mapping[str, Any]) -> np.ndarray:
  dtype, shape = np.dtype(said["dtype"]), tuple(said["shape"])
  expected = said["begin"] + dtype.itemsize * int(np.prod(shape))
  try:
    there = file.stat().st_size
    if there != expected:
      raise StoreError(
        f"{file} has {there:,} bytes, and {expected:,} were written; it was cut"
        " short, or is another file. Restore it, or write the store again."
      )
    with file.open("rb") as opened:
      if opened.read(said["begin"]) != column.header(dtype, shape):
        raise StoreError(
          f"{file} begins with another header than was written; restore it, or"
          " write the store again."
        )
  except FileNotFoundError:
    raise StoreError(
      f"{file} is missing; restore it, or write the store again."
    ) from None
  if not np.prod(shape):
    return np.zeros(shape, dtype)
  return np.memmap(file, dtype, "r", offset=said["begin"], shape=shape)
