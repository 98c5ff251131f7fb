"""Arrays from files that should hold known shapes: idx, and parts of `.npz`.

idx is MNIST's format (Y. LeCun, C. Cortes, C. Burges): two zero bytes, a code
of the dtype, the number of dimensions, their sizes as big-endian int32, data.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedjax_sim.data.loaders import npz

Shape = Sequence[int | None]  # None: any number

_UINT8 = 0x08


def contents(file: Path) -> bytes:
  """A file's bytes, decompressed if it is gzipped, whatever its name.

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
  """The uint8 array of an idx file, plain or gzipped; read-only.

  Args:
    file: the file.
    shape: what it should hold.

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
  """Arrays of whole numbers from an `.npz` file, which may hold more.

  Args:
    file: the file.
    fields: the shape of each.

  Raises:
    ValueError: one is missing, or is something else.
  """
  arrays = npz.read_npz(file)
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
