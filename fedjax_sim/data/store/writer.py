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

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.location import local
from fedjax_sim.data.store import column as columns
from fedjax_sim.data.store.format import (
  FORMAT,
  OF_TRAIN,
  PREPARE,
  SPLITS,
  VERSION,
  naming_store,
  seal,
)
from fedjax_sim.data.store.split_writer import SplitWriter


class StoreWriter:
  """A store that is being written; a context manager.

  If it is left without an exception, the store is whole; else nothing is kept.

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
      num_classes = validate.integer(
        "num_classes", num_classes, ge=0, le=2**31 - 1
      )
    if name is not None:
      validate.instance("name", name, str, "'my data'")
    validate.one_of("prepare", prepare, PREPARE)
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
    with naming_store(self.path):
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
    """Return the writer of a split.

    Args:
      name: of `SPLITS`. The clients of `OF_TRAIN` are those of "train", which
        must be there first; "test" and "server" have one client, the center.

    Raises:
      UnknownNameError: no such split.
      ValueError: outside the context, or one of `OF_TRAIN` before "train".
    """
    validate.one_of("split", name, SPLITS)
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
    with naming_store(self.path):
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
