"""Write one split of a client store."""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedjax_sim.core import validate
from fedjax_sim.data.federated import check_finite, offsets_of
from fedjax_sim.data.store.column import Column
from fedjax_sim.data.store.format import FIELD, OF_TRAIN, naming_store


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
    """The number of clients so far."""
    return len(self._clients._index if self._clients else self._index)

  @property
  def num_examples(self) -> int:
    """The number of examples so far."""
    return max((c.rows for c in self._columns.values()), default=0)

  def has(self, name: str) -> bool:
    """Return whether there is a client of this name so far."""
    return name in (self._clients or self)._index

  def dtype_of(self, field: str) -> np.dtype[Any] | None:
    """Return a field's dtype in this split or in the first, or None."""
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
    """Add examples of some clients.

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
    with naming_store(self._path):
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
        validate.same_fields(
          where, examples, f"what came before ({owner})", model
        )
    if self._columns:
      return
    for field, values in examples.items():
      if not FIELD.fullmatch(field):
        raise ValueError(
          f"{where}: field {field!r} cannot name a file; call it by letters,"
          " digits and _, at most 64."
        )
      file = self._folder / "fields" / f"{field}.npy"
      self._columns[field] = Column(file, values)

  def finish(self) -> dict[str, Any]:
    """Close the split; return its entry in `store.json`."""
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
    """Close the files that are open."""
    for column in self._columns.values():
      column.close()


def _whose(where: str, name: Any) -> str:
  """Return the client's source in words, with the client's name once."""
  told = f"client {name!r}"
  return where if where.endswith(told) else f"{where}: {told}"


def _destinations(clients: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Return each segment's first row after sorting by client, stable."""
  order = np.argsort(clients, kind="stable")
  before = np.cumsum(counts[order]) - counts[order]
  destinations = np.empty_like(before)
  destinations[order] = before  # sorted segments follow each other without gaps
  return destinations
