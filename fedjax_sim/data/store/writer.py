"""Writes a client store: examples on the disk, client after client.

Examples come in blocks, of whichever clients, and go to the disk at once: the
memory that this takes is that of one block, and some hundred bytes a client.
Clients that come back later are sorted together at the end. The store takes its
name when it is whole; a failure leaves nothing.

A store is a folder of `.npy` files, a folder a split, and `store.json`:

  store.json            what there is, and SHA-256 sums
  train/offsets.npy     int64, (clients + 1,)
  train/names.npy       the clients' names, UTF-8, end to end
  train/name_ends.npy   int64, (clients,); where each name ends
  train/fields/x.npy    (examples, ...), and so on
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fedjax_sim.core import validate
from fedjax_sim.data.federated import (
  Prepare,
  as_stored,
  check_finite,
  from_bytes,
  offsets_of,
)
from fedjax_sim.data.loaders.leaf import prepare_ids, prepare_numbers
from fedjax_sim.data.location import local
from fedjax_sim.data.store import column as columns
from fedjax_sim.data.store.column import Column

FORMAT, VERSION = "fedjax_sim store", 1
FURTHER = ("labelled", "unlabelled")  # of train's clients, for some algorithms
OF_TRAIN = ("seen", *FURTHER)  # splits whose clients are those of train
SPLITS = ("train", "seen", "unseen", *FURTHER, "test", "server")
PREPARE: Mapping[str, Prepare] = {
  "stored": as_stored,
  "bytes": from_bytes,
  "numbers": prepare_numbers,
  "ids": prepare_ids,
}
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # it names a file
FILE = re.compile(rf"(fields/{_FIELD.pattern}|offsets|names|name_ends)\.npy")


class StoreWriter:
  """A store that is being written; a context.

  Left without an exception, the store is there, whole; else nothing is.

  Attributes:
    path: the store's folder.
    num_classes: of the labels "y"; may be set as long as the store is written.

  Args:
    path: the store's folder, which must not be there yet.
    name: what reports call the data; None: the folder's name.
    num_classes: of the labels "y"; None: the largest + 1, or 0 where labels are
      no whole numbers, one an example; 0: labels are no classes.
    prepare: how a batch becomes what the model gets: "stored", as it is;
      "bytes", x from 0 to 255 as float32 from 0 to 1; "numbers", x as float32;
      "ids", x as int32.
    vocabulary: what ids of x stand for, if it was text; only noted.

  Raises:
    FileExistsError: there is something at `path`.
    TypeError, ValueError: an argument is out of range.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    num_classes: int | None = None,
    prepare: str = "stored",
    vocabulary: Sequence[str] | None = None,
  ):
    self.path = local(path)
    if self.path.exists() or self.path.is_symlink():
      raise FileExistsError(
        f"{self.path} is there already; give a store another name, or remove"
        " it."
      )
    if num_classes is not None:
      num_classes = validate.whole(
        "num_classes", num_classes, least=0, most=2**31 - 1
      )
    if name is not None:
      validate.instance("name", name, str, "'my data'")
    validate.known("prepare", prepare, PREPARE)
    self.num_classes = num_classes
    self._facts: dict[str, Any] = {
      "name": self.path.name if name is None else name,
      "prepare": prepare,
    }
    if vocabulary is not None:
      self._facts["vocabulary"] = list(vocabulary)
    self._folder: Path | None = None
    self._splits: dict[str, SplitWriter] = {}

  def __enter__(self) -> StoreWriter:
    parent = self.path.parent
    with _told(self.path):
      parent.mkdir(parents=True, exist_ok=True)
      made = tempfile.mkdtemp(prefix=f".{self.path.name[:40]}.", dir=parent)
    self._folder = Path(made)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    assert self._folder is not None
    try:
      if kind is None:
        self._finish(self._folder)
    finally:
      for split in self._splits.values():
        with contextlib.suppress(OSError):  # of a full disk, once more
          split.close()
      shutil.rmtree(self._folder, ignore_errors=True)

  def split(self, name: str) -> SplitWriter:
    """The writer of a split.

    Args:
      name: of `SPLITS`. The clients of `OF_TRAIN` are those of "train", which
        must be there first; "test" and "server" have one client, the centre.

    Raises:
      UnknownNameError: no such split.
      ValueError: outside the context, or one of `OF_TRAIN` before "train".
    """
    validate.known("split", name, SPLITS)
    if self._folder is None:
      raise ValueError("A store is written inside `with StoreWriter(...)`.")
    if name not in self._splits:
      like = self._splits.get("train")
      if name in OF_TRAIN and like is None:
        raise ValueError(
          f"split={name!r} has train's clients; write train first."
        )
      self._splits[name] = SplitWriter(
        self._folder / name, self.path, name, like
      )
    return self._splits[name]

  def _finish(self, folder: Path) -> None:
    train = self._splits.get("train")
    if train is None or not train.num_clients:
      raise ValueError(
        f"{self.path}: there is no client with examples; give at least one."
      )
    with _told(self.path):
      splits = {name: split.finish() for name, split in self._splits.items()}
      self._check_labels(splits)
      self._check_bytes(splits)
      facts: dict[str, Any] = {"format": FORMAT, "version": VERSION}
      facts |= {"num_classes": self.num_classes, "block": columns.BLOCK}
      facts |= {**self._facts, "splits": splits}
      facts["sha256"] = seal(facts)
      text = json.dumps(facts, indent=1)
      with (folder / "store.json").open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      folder.chmod(0o755)
      if self.path.exists():
        raise FileExistsError(f"{self.path} was made meanwhile; remove it.")
      folder.rename(self.path)

  def _check_labels(self, splits: Mapping[str, Any]) -> None:
    classes = self.num_classes
    for name, split in splits.items():
      least, most = split["bounds"].get("y", (0, -1))
      y = split["files"].get("fields/y.npy")
      if classes and y and np.dtype(y["dtype"]).kind not in "iu":
        raise ValueError(
          f"{self.path}, {name}: labels 'y' are {np.dtype(y['dtype'])}, and"
          f" num_classes={classes}; give whole numbers, or num_classes=0 if"
          " they are no classes."
        )
      if classes is None and least < 0:
        raise ValueError(
          f"{self.path}, {name}: labels 'y' go down to {least}; give labels"
          " from 0 on, or num_classes=0 if they are no classes."
        )
      if classes and (least < 0 or most >= classes):
        raise ValueError(
          f"{self.path}, {name}: labels 'y' go from {least} to {most}, and"
          f" num_classes={classes}; give labels from 0 to {classes - 1}, or"
          " another number of classes."
        )

  def _check_bytes(self, splits: Mapping[str, Any]) -> None:
    x = splits["train"]["files"].get("fields/x.npy")
    if self._facts["prepare"] == "bytes" and x and x["dtype"] != "|u1":
      raise ValueError(
        f"{self.path}: prepare='bytes' is for x from 0 to 255, uint8, and it is"
        f" {np.dtype(x['dtype'])}; give another, such as 'numbers'."
      )


class SplitWriter:
  """A split that is being written; made by `StoreWriter.split`."""

  def __init__(
    self, folder: Path, path: Path, name: str, like: SplitWriter | None
  ):
    self._folder, self._path, self._name = folder, path, name
    self._like = like  # the split that all others take after
    self._clients = like if name in OF_TRAIN else None
    self._index: dict[str, int] = {}
    self._client, self._count = array.array("q"), array.array("q")
    self._columns: dict[str, Column] = {}
    self._bounds: dict[str, tuple[int, int]] = {}
    self._failed = False  # a block is half written
    (folder / "fields").mkdir(parents=True)

  @property
  def num_clients(self) -> int:
    """How many clients there are so far."""
    return len(self._clients._index if self._clients else self._index)

  @property
  def num_examples(self) -> int:
    """How many examples there are so far."""
    return max((c.rows for c in self._columns.values()), default=0)

  def has(self, name: str) -> bool:
    """Whether there is a client of this name so far."""
    return name in (self._clients or self)._index

  def dtype_of(self, field: str) -> np.dtype[Any] | None:
    """The dtype of a field in this split or in the first; None: not there."""
    for split in (self, self._like):
      if split is not None and field in split._columns:
        return split._columns[field].example.dtype
    return None

  def append(
    self,
    names: Sequence[str],
    sizes: npt.ArrayLike,
    examples: Mapping[str, np.ndarray],
    where: str | None = None,
    repeats: bool = True,
  ) -> None:
    """Adds examples of some clients.

    Args:
      names: the clients, each once.
      sizes: shape=(clients,); how many examples are whose; 0 leaves a client
        out.
      examples: field -> (examples, ...), client after client.
      where: what messages call the source; None: the split.
      repeats: whether a client may have examples from an earlier call.

    Raises:
      TypeError, ValueError: fields that differ from earlier ones, names or
        sizes that do not fit, NaN; names field and client.
      OSError: the disk is full.
    """
    where = f"{self._path}, {self._name}" if where is None else where
    counts = np.asarray(sizes)
    if counts.size and counts.dtype.kind not in "iu":
      raise TypeError(f"{where}: sizes are {counts.dtype}; give whole numbers.")
    counts = counts.astype(np.int64)
    total = validate.arrays(where, examples)
    if counts.shape != (len(names),) or counts.min(initial=0) < 0:
      raise ValueError(
        f"{where}: sizes has shape {counts.shape} for {len(names)} clients, or"
        " a negative number; give each its number of examples."
      )
    if counts.sum() != total:
      raise ValueError(
        f"{where}: sizes add up to {counts.sum()}, and there are {total}"
        " examples; let both agree."
      )
    self._check_fields(where, examples)
    ends = np.cumsum(counts)

    def owner(row: int) -> str:
      i = int(np.searchsorted(ends, row, side="right"))
      return f"{_whose(where, names[i])}, example {row - ends[i] + counts[i]}"

    for field, values in examples.items():
      check_finite(field, values, owner)
    self._failed = True
    clients = [
      self._number(where, name, repeats) if count else -1
      for name, count in zip(names, counts.tolist(), strict=True)
    ]
    self._client.extend(c for c in clients if c >= 0)
    self._count.extend(count for count in counts.tolist() if count)
    with _told(self._path):
      for field, values in examples.items():
        self._columns[field].append(values)
        if values.dtype.kind in "iu" and values.ndim == 1 and total:
          low, high = int(values.min()), int(values.max())
          least, most = self._bounds.get(field, (low, high))
          self._bounds[field] = min(least, low), max(most, high)
    self._failed = False

  def _number(self, where: str, name: str, repeats: bool) -> int:
    if not isinstance(name, str):
      raise TypeError(f"{_whose(where, name)} has no name; give a string.")
    if self._clients is not None:
      if name not in self._clients._index:
        raise ValueError(
          f"{_whose(where, name)} is not among those that train; give"
          f" {self._name!r} examples of training clients, or write 'unseen'."
        )
      return self._clients._index[name]
    known = len(self._index)
    number = self._index.setdefault(name, known)
    if number < known and not repeats:
      raise ValueError(
        f"{_whose(where, name)} is there twice; give every client once."
      )
    if number == known:
      try:
        name.encode()
      except UnicodeEncodeError as error:
        raise ValueError(
          f"{_whose(where, name)} has a name that is no UTF-8; give another."
        ) from error
    return number

  def _check_fields(
    self, where: str, examples: Mapping[str, np.ndarray]
  ) -> None:
    for owner, split in ((self._name, self), ("train", self._like)):
      if split is not None and split._columns:
        model = {k: c.example for k, c in split._columns.items()}
        validate.alike(where, examples, f"what came before ({owner})", model)
    if self._columns:
      return
    for field, values in examples.items():
      if not _FIELD.fullmatch(field):
        raise ValueError(
          f"{where}: field {field!r} cannot name a file; call it by letters,"
          " digits and _, at most 64."
        )
      file = self._folder / "fields" / f"{field}.npy"
      self._columns[field] = Column(file, values)

  def finish(self) -> dict[str, Any]:
    """Closes the split; returns what `store.json` says of it."""
    for column in self._columns.values():
      column.finish()
    if self._failed:
      raise ValueError(
        f"{self._path}, {self._name}: an earlier block was refused half-way;"
        " begin again."
      )
    if not self._count:
      raise ValueError(
        f"{self._path}, {self._name}: there are no examples; leave it out."
      )
    clients = np.frombuffer(self._client, np.int64)
    counts = np.frombuffer(self._count, np.int64)
    sizes = np.zeros(self.num_clients, np.int64)
    np.add.at(sizes, clients, counts)
    offsets = offsets_of(sizes)
    if (np.diff(clients) < 0).any():
      for column in self._columns.values():
        column.reorder(_destinations(clients, counts), counts)
    names = (self._clients or self)._index
    encoded = [name.encode() for name in names]
    tables = {
      "offsets": offsets,
      "names": np.frombuffer(b"".join(encoded), np.uint8),
      "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
    }
    files: dict[str, Any] = {}
    for table, values in tables.items():
      column = Column(self._folder / f"{table}.npy", values)
      column.append(values)
      column.finish()
      files[f"{table}.npy"] = column.facts()
    for field, column in self._columns.items():
      files[f"fields/{field}.npy"] = column.facts()
    return {
      "clients": len(sizes),
      "examples": int(offsets[-1]),
      "bounds": self._bounds,
      "files": files,
    }

  def close(self) -> None:
    """Closes what is open."""
    for column in self._columns.values():
      column.close()


def _whose(where: str, name: Any) -> str:
  """The client's source, which may name the client already."""
  told = f"client {name!r}"
  return where if where.endswith(told) else f"{where}: {told}"


def _destinations(clients: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Where each segment belongs: after those of its client that came before."""
  order = np.argsort(clients, kind="stable")
  before = np.cumsum(counts[order]) - counts[order]
  destinations = np.empty_like(before)
  destinations[order] = before  # sorted segments follow each other without gaps
  return destinations


def seal(facts: Mapping[str, Any]) -> str:
  """SHA-256 of what `store.json` says, but for this."""
  told = {k: v for k, v in facts.items() if k != "sha256"}
  return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _told(path: Path) -> Any:
  """Errors of the disk name the store."""
  try:
    yield
  except OSError as error:
    if error.errno is None:
      raise
    raise OSError(
      error.errno,
      f"cannot write {path}: {error.strerror}; give a writable folder with"
      " space left. Nothing was kept",
    ) from error
