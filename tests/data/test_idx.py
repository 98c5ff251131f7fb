"""idx files and named arrays: read as written, refused with their reason."""

import gzip
import re
import struct

import numpy as np
import pytest

from fedjax_sim.data.array_files import read_fields, read_idx
from fedjax_sim.data.location import find

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def idx(
  array=ARRAY, *, magic=b"\0\0", code=8, dimensions=None, sizes=None, extra=b""
):
  """The bytes of an idx file, by the format's description."""
  sizes = array.shape if sizes is None else sizes
  dimensions = array.ndim if dimensions is None else dimensions
  head = (
    magic + bytes([code, dimensions]) + struct.pack(f">{len(sizes)}i", *sizes)
  )
  return head + array.tobytes() + extra


def compress(data):
  return gzip.compress(data, mtime=0)  # the same data in every process


@pytest.mark.parametrize("pack", [bytes, compress])
@pytest.mark.parametrize("shape", [(2, 3, 4), (None, 3, 4)])
def test_idx(tmp_path, pack, shape):
  file = tmp_path / "images"  # the name does not say whether it is gzipped
  file.write_bytes(pack(idx()))
  array = read_idx(file, shape)
  assert array.dtype == np.uint8
  np.testing.assert_array_equal(array, ARRAY)


@pytest.mark.parametrize(
  ("data", "match"),
  [
    (b"", "header: expected 16 bytes, found 0"),
    (idx()[:15], "header: expected 16 bytes, found 15"),
    (idx(magic=b"PK"), "magic: expected two zero bytes first, found 0x504b"),
    (idx(code=9), "dtype: expected 0x08, uint8, found 0x09"),
    (idx(ARRAY[0], extra=b"1234"), "dimensions: expected 3, found 2"),
    (idx(ARRAY.reshape(2, 4, 3)), r"\(any, 3, 4\), found \(2, 4, 3\)"),
    (idx()[:-1], r"data: expected 24 bytes for shape \(2, 3, 4\), found 23"),
    (idx(extra=b"0"), "data: expected 24 bytes .*, found 25"),
    (idx(sizes=(3, 3, 4)), "data: expected 36 bytes .*, found 24"),
    (compress(idx())[:-9], "is damaged: .*a whole gzip file was expected"),
    (compress(idx()) + b"tail", "is damaged: "),
  ],
)
@pytest.mark.parametrize("pack", [bytes, compress])
def test_idx_refuses(tmp_path, pack, data, match):
  file = tmp_path / "train-images"
  file.write_bytes(data if data[:2] == b"\x1f\x8b" else pack(data))
  with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{match}"):
    read_idx(file, (None, 3, 4))


def test_find(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"holds no a or a.gz; put it"):
    find(tmp_path, "a", "a.gz")
  (tmp_path / "a.gz").touch()
  assert find(tmp_path, "a", "a.gz").name == "a.gz"
  (tmp_path / "a").touch()
  assert find(tmp_path, "a", "a.gz").name == "a"


def test_fields(tmp_path):
  file = tmp_path / "ids.npz"
  np.savez(file, a=ARRAY, b=np.arange(3, dtype=np.int16), c=np.ones(2))
  read = read_fields(file, {"b": (None,), "a": (2, None, 4)})
  assert list(read) == ["b", "a"]
  assert read["b"].dtype == np.int16
  np.testing.assert_array_equal(read["a"], ARRAY)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"d": (None,)}, r"d: expected an array of shape \(any,\), found none"),
    ({"b": (4,)}, r"shape of b: expected \(4,\), found \(3,\)"),
    ({"a": (None,)}, r"shape of a: expected \(any,\), found \(2, 3, 4\)"),
    ({"c": (2,)}, "dtype of c: expected integers, found float64"),
  ],
)
def test_fields_refuses(tmp_path, fields, match):
  file = tmp_path / "ids.npz"
  np.savez(file, a=ARRAY, b=np.arange(3), c=np.ones(2))
  with pytest.raises(ValueError, match=rf"ids\.npz: {match}"):
    read_fields(file, fields)
