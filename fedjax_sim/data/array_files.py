"""Arrays from files that should hold known shapes: idx, and parts of `.npz`.

idx is MNIST's format (Y. LeCun, C. Cortes, C. Burges): two zero bytes, a code
of the dtype, the number of dimensions, their sizes as big-endian int32, data.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

Shape = Sequence[int | None]  # None: any number

_UINT8 = 0x08


def contents(file: Path) -> bytes:
  """Return a file's bytes, decompressed if they are gzip, whatever its name.

  Raises:
    ValueError: the compression is damaged.
  """
  data = file.read_bytes()
  if not data.startswith(b"\x1f\x8b"):
    return data
  try:
    return gzip.decompress(data)
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(
      f"{file} is damaged: {str(error).rstrip('.')}; a whole gzip file was"
      " expected. Get it again."
    ) from error


def read_idx(file: Path, shape: Shape) -> np.ndarray:
  """Read the uint8 array of an idx file, plain or gzipped; it is read-only.

  Args:
    file: the file.
    shape: the shape that the array must have; a None fits any size.

  Raises:
    ValueError: it holds something else; names the field that says so.
  """
  data = contents(file)
  header = 4 + 4 * len(shape)
  if len(data) < header:
    raise _wrong(file, "header", f"{header} bytes", f"{len(data)}")
  zeros, dtype, dimensions = struct.unpack(">HBB", data[:4])
  if zeros:
    raise _wrong(file, "magic", "two zero bytes first", f"{zeros:#06x}")
  if dtype != _UINT8:
    raise _wrong(file, "dtype", f"{_UINT8:#04x}, uint8", f"{dtype:#04x}")
  if dimensions != len(shape):
    raise _wrong(file, "dimensions", f"{len(shape)}", f"{dimensions}")
  sizes = struct.unpack(f">{dimensions}I", data[4:header])
  if not _fits(sizes, shape):
    raise _wrong(file, "shape", _text(shape), _text(sizes))
  if len(data) - header != math.prod(sizes):
    expected = f"{math.prod(sizes)} bytes for shape {_text(sizes)}"
    raise _wrong(file, "data", expected, f"{len(data) - header}")
  return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)


def read_fields(
  file: Path, fields: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
  """Read arrays of whole numbers from an `.npz` file, which may hold more.

  Args:
    file: the file.
    fields: name -> the shape that the array must have, as in `read_idx`.

  Raises:
    ValueError: an array is missing, or has another dtype or shape.
  """
  arrays = read_npz(file)
  for field, shape in fields.items():
    if field not in arrays:
      raise _wrong(
        file, field, f"an array of shape {_text(shape)}", "none of this name"
      )
    array = arrays[field]
    if array.dtype.kind not in "iu":
      raise _wrong(file, f"dtype of {field}", "integers", f"{array.dtype}")
    if not _fits(array.shape, shape):
      raise _wrong(file, f"shape of {field}", _text(shape), _text(array.shape))
  return {field: arrays[field] for field in fields}


def _fits(sizes: Sequence[int], shape: Shape) -> bool:
  return len(sizes) == len(shape) and all(
    wanted in (None, size) for size, wanted in zip(sizes, shape, strict=True)
  )


def _text(shape: Shape) -> str:
  sizes = ", ".join("any" if n is None else str(n) for n in shape)
  return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _wrong(file: Path, field: str, expected: str, found: str) -> ValueError:
  return ValueError(
    f"{file}: {field}: expected {expected}, found {found}. Get the file again,"
    " or correct data.path."
  )


_SINGLE = b"\x93NUMPY"  # how a .npy file begins


def read_npz(file: Path, field: str = "data.path") -> dict[str, np.ndarray]:
  """Read the arrays of an `.npz` file, by name.

  Args:
    file: the file.
    field: what messages call the config's field that names the file.

  Raises:
    ValueError: the file is no `.npz` file, is damaged, or holds objects.
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
  """Return the name of each array -> the name of its file in the archive."""
  return {
    name.removesuffix(".npy"): name
    for name in archive.namelist()
    if name.endswith(".npy")
  }


class Member:
  """An array of an `.npz` file, read row after row.

  It may be written in any order of bytes and of axes. In Fortran order a row is
  not contiguous, so such an array is held in memory.

  Attributes:
    shape: the array's shape.
    row: how many bytes a row has.
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
    """Return the next `rows` rows, or all with None; native bytes, C order.

    Raises:
      ValueError: the array ends before the last of them.
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
