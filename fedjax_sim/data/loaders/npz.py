"""A user's own federated data from one `.npz` file, without unpickling.

It holds `x`, (examples, ...), `y`, (examples, ...), and `client`, (examples,),
an integer or string that names each example's client; and, both or neither,
the central test set `test_x`, `test_y`:

  np.savez("mine.npz", x=x, y=y, client=user_of_each_example)
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.federated import FederatedData, FederatedDataset
from fedjax_sim.data.location import locate
from fedjax_sim.data.partition import by_key
from fedjax_sim.data.splits import Clients, make_dataset

_REQUIRED = ("x", "y", "client")
_TEST = ("test_x", "test_y")
_SINGLE = b"\x93NUMPY"  # how a .npy file begins


def load_npz(
  *,
  path: str | os.PathLike[str] | None = None,
  num_classes: int | None = None,
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Clients, named and sorted by the file's `client`.

  Args:
    path: the file; see `locate`.
    num_classes: None: the largest integer label + 1, or 0 if `y` is no
      integer; 0: `y` is no class.
    heldout_fraction: see `make_dataset`.
    unseen_clients: see `make_dataset`.
    min_examples: clients with fewer are left out.
    seed: of the splits.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: it is damaged, lacks arrays or holds wrong ones.
  """
  file = locate(path)
  arrays = read_npz(file)
  present = ", ".join(sorted(arrays)) or "nothing"
  needed = _REQUIRED + (_TEST if set(_TEST) & set(arrays) else ())
  missing = [name for name in needed if name not in arrays]
  if missing:
    raise ValueError(
      f"{file} lacks {', '.join(missing)}; it holds {present}. Write it with "
      "np.savez(file, x=..., y=..., client=...)."
    )
  for name in arrays:
    validate.known(f"{file}: array", name, _REQUIRED + _TEST)
  examples = {"x": arrays["x"], "y": arrays["y"]}
  if not validate.arrays(str(file), examples):
    raise ValueError(f"{file}: x has no examples; give at least one.")
  _check_labels(file, arrays["y"])
  test = None
  if "test_x" in arrays:
    test = {"x": arrays["test_x"], "y": arrays["test_y"]}
  if num_classes is None:
    num_classes = _count_classes(arrays["y"], arrays.get("test_y"))
  client_of, names = by_key(arrays["client"])
  return make_dataset(
    file.stem,
    FederatedData.from_assignment(examples, client_of, names=names),
    num_classes=num_classes,
    test=test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
  )


def _count_classes(*labels: np.ndarray | None) -> int:
  given = [array for array in labels if array is not None and array.size]
  if any(array.dtype.kind not in "iu" for array in given):
    return 0
  return 1 + max((int(array.max()) for array in given), default=-1)


def _check_labels(file: Path, y: np.ndarray) -> None:
  """Refuses classes as columns: one number, or one 1, a row."""
  if y.ndim != 2 or y.dtype.kind not in "iub":
    return
  if y.shape[1] == 1:
    raise ValueError(f"{file}: y has shape {y.shape}; write y=y[:, 0].")
  if y.min() >= 0 and y.max() == 1 and (y.sum(axis=1) == 1).all():
    raise ValueError(
      f"{file}: y, of shape {y.shape}, is one-hot; write y=y.argmax(axis=1)."
    )


def read_npz(file: Path, field: str = "data.path") -> dict[str, np.ndarray]:
  """The arrays of an `.npz` file, by name; messages call its path `field`.

  Raises:
    ValueError: it is none, is damaged, or holds objects.
  """
  if file.is_dir():
    raise ValueError(f"{file} is a folder; let {field} name the .npz file.")
  try:
    with file.open("rb") as stream:
      if stream.read(len(_SINGLE)) == _SINGLE:
        raise ValueError("it holds a single array")
    with zipfile.ZipFile(file) as archive:
      found = {}
      for name, member in members_of(archive).items():
        with archive.open(member) as stream:
          held = Member(f"array {name!r}", stream)
          found[name] = held.read(None)
      return found
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    OverflowError,  # a damaged size
    RuntimeError,  # encrypted, or compressed in an unknown way
    ValueError,
  ) as error:
    why = str(error).rstrip(".")
    raise ValueError(
      f"{file} (from {field}) cannot be read: {why}. It is damaged, is "
      "not .npz, or holds objects, which would need unpickling; write it "
      "again with np.savez, of numeric and string arrays."
    ) from error


def members_of(archive: zipfile.ZipFile) -> dict[str, str]:
  """Return array -> the archive's member."""
  return {
    name.removesuffix(".npy"): name
    for name in archive.namelist()
    if name.endswith(".npy")
  }


class Member:
  """An array of an `.npz` file, read row after row.

  Whatever order of bytes and of axes it is written in. One in Fortran order has
  no rows in a row, and is held in memory.

  Attributes:
    shape: the array's.
    row: bytes of a row.
  """

  def __init__(self, where: str, stream: IO[bytes]):
    self._where, self._stream = where, stream
    read: Any = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(stream))
    if read is None:
      raise ValueError(f"{where} is of an unknown version of .npy.")
    self.shape, self._fortran, self._dtype = read(stream)
    if self._dtype.hasobject or self._dtype.kind not in "biufcUS":
      raise ValueError(
        f"{where} has dtype {self._dtype}; give numbers, or text, that need no"
        " unpickling."
      )
    each = int(np.prod(self.shape[1:], dtype=object))
    self.row = self._dtype.itemsize * each
    self._done = 0
    self._whole: np.ndarray | None = None

  def read(self, rows: int | None) -> np.ndarray:
    """Return the next rows, in native bytes and C order, or None: all.

    Raises:
      ValueError: the member ends before them, or goes on after the last one.
    """
    if self._fortran and len(self.shape) > 1:
      if self._whole is None:
        flat = self._values(int(np.prod(self.shape, dtype=object)))
        self._whole = flat.reshape(self.shape, order="F")
      begin, end = self._done, None if rows is None else self._done + rows
      self._done = len(self._whole) if end is None else end
      return np.ascontiguousarray(self._whole[begin:end])
    if rows is None and not self.shape:
      return self._values(1).reshape(())
    rows = self.shape[0] - self._done if rows is None else rows
    self._done += rows
    each = self.shape[1:]
    return self._values(rows * int(np.prod(each, dtype=object))).reshape(
      rows, *each
    )

  def _values(self, count: int) -> np.ndarray:
    size = count * self._dtype.itemsize
    data = self._stream.read(size)
    if len(data) != size:
      raise ValueError(f"{self._where} ends before its last row.")
    if not self._dtype.itemsize:  # of texts without a letter
      return np.zeros(count, self._dtype)
    values = np.frombuffer(data, self._dtype)
    if self._dtype.kind == "S":
      values = np.strings.decode(values, "utf-8")
    return values.astype(values.dtype.newbyteorder("="), copy=False)
