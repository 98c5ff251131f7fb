"""Weights files: bit for bit in three formats, and nothing else is read."""

import io
import json
import os
import pickle
import re
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

from fedjax_sim.core import Variables
from fedjax_sim.core.weights import (
  FORMATS,
  WeightsError,
  file_digest,
  named_arrays,
  read_weights,
  write_weights,
)

RNG = np.random.default_rng(0)
ARRAYS = {
  "layers/0/kernel": RNG.normal(size=(3, 4)).astype(np.float32),
  "layers/0/bias": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
  "file": np.arange(3),  # what np.savez calls a parameter of its own
  "half": RNG.normal(size=5).astype(np.float16),
  "brain": RNG.normal(size=(2, 5)).astype(jnp.bfloat16),
  "wide": RNG.normal(size=(1, 2, 3)),
  "scalar": np.float32(1.5),
  "brain scalar": np.array(2.5, jnp.bfloat16),
  "empty": np.zeros((0, 3), np.float32),
  "empty brain": np.zeros((2, 0), jnp.bfloat16),
  "yes": np.array([True, False]),
  **{
    f"whole/{kind}{bits}": np.array([0, 2 ** (bits - 1) - 1], f"{kind}{bits}")
    for kind in ("int", "uint")
    for bits in (8, 16, 32, 64)
  },
  "ü/ name": np.zeros(1, np.int8),
}
METADATA = {"config": json.dumps({"a": [1, None]}), "round": "7", "ü": "ß\n"}
SMALL = {"w": np.arange(6, dtype=np.float32)}


def same(found, expected):
  assert list(found) == sorted(expected)
  for name, array in expected.items():
    array = np.asarray(array)
    assert found[name].dtype == array.dtype, name
    assert found[name].shape == array.shape, name
    assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_dtype_and_shape_comes_back_bit_for_bit(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  write_weights(path, ARRAYS, METADATA)
  arrays, metadata = read_weights(str(path))
  same(arrays, ARRAYS)
  assert metadata.pop("sha256")
  assert metadata == METADATA
  first = path.read_bytes()
  write_weights(path, dict(reversed(ARRAYS.items())), METADATA)
  assert path.read_bytes() == first
  assert os.listdir(tmp_path) == [path.name]  # nothing half-written
  assert len(file_digest(path)) == 64


@pytest.mark.parametrize("suffix", FORMATS)
def test_trees_strides_and_byte_orders(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  matrix = np.arange(6.0).reshape(2, 3)
  tree = {"a": [matrix.T, jnp.ones(2)], "b": matrix.astype(">f8"), "c": None}
  write_weights(path, tree)
  expected = {"a/0": matrix.T.copy(), "a/1": np.ones(2, np.float32)}
  same(read_weights(path).arrays, {**expected, "b": matrix})


def test_the_formats_are_those_of_the_libraries(tmp_path):
  w, n = np.ones((2, 1), np.float32), np.array(3, np.int8)
  nested = {"layers": {"0": {"w": w}}, "n": n}
  flat: dict[str, np.ndarray] = {"layers/0/w": w, "n": n}
  for suffix in FORMATS:
    write_weights(tmp_path / f"ours{suffix}", nested)
  same(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), flat)
  found = np.load(tmp_path / "ours.npz", allow_pickle=False)
  same({name: found[name] for name in sorted(flat)}, flat)
  restored = serialization.msgpack_restore(
    (tmp_path / "ours.msgpack").read_bytes()
  )
  same({name: restored[name] for name in sorted(flat)}, flat)

  safetensors.numpy.save_file(flat, tmp_path / "theirs.safetensors")
  np.savez_compressed(tmp_path / "theirs.npz", **flat)  # type: ignore[arg-type]
  content = serialization.to_bytes(nested)
  (tmp_path / "theirs.msgpack").write_bytes(content)
  for suffix in FORMATS:
    arrays, metadata = read_weights(tmp_path / f"theirs{suffix}")
    same(arrays, flat)
    assert metadata == {}


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_refused_in_a_line(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  write_weights(path, SMALL, METADATA)
  content = path.read_bytes()
  cuts = [content[:size] for size in range(0, len(content), 7)]
  flipped = []
  for position in range(0, len(content), 5):
    changed = bytearray(content)
    changed[position] ^= 0x20
    flipped.append(bytes(changed))
  refused = 0
  for damaged in (*cuts, *flipped, b"", b"hello", content[::-1]):
    path.write_bytes(damaged)
    said = ""
    try:
      arrays = read_weights(path).arrays
    except WeightsError as error:
      said = str(error)
    if said:
      assert said.startswith(f"{path} is damaged (")
      assert "\n" not in said
      refused += 1
    else:  # a byte of the metadata, or one that the format does not use
      same(arrays, SMALL)
  assert refused > len(cuts)


def test_a_number_that_changed_is_damage(tmp_path):
  path = tmp_path / "model.safetensors"
  write_weights(path, SMALL)
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(WeightsError, match="its SHA-256 differs"):
    read_weights(path)


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_not_even_opened(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  path.write_bytes(pickle.dumps(SMALL))
  for call in (read_weights, lambda path: write_weights(path, SMALL)):
    with pytest.raises(
      WeightsError,
      match=rf"a {suffix} file is a pickle, which runs code .*docs/weights.md",
    ):
      call(path)


@pytest.mark.parametrize("name", ["model.h5", "model", "model.npz.gz"])
def test_other_suffixes_name_the_three(name, tmp_path):
  with pytest.raises(
    WeightsError, match=r"one of \.safetensors, \.npz, \.msgpack"
  ):
    write_weights(tmp_path / name, SMALL)


class Bomb:
  """Unpickling it fails the test."""

  def __reduce__(self):
    return pytest.fail, ("it was unpickled",)


def test_object_arrays_are_refused(tmp_path):
  path = tmp_path / "model.npz"
  np.savez(path, a=np.ones(2), b=np.array([Bomb()], object))
  with pytest.raises(WeightsError, match=r"holds 'b' as pickled .*np\.asarray"):
    read_weights(path)
  file = io.BytesIO()  # a pickle in a zip file
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("b.npy", pickle.dumps(Bomb()))
  path.write_bytes(file.getvalue())
  with pytest.raises(WeightsError, match="is damaged"):
    read_weights(path)


@pytest.mark.parametrize(
  ("tree", "error", "message"),
  [
    ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, WeightsError, "called 'a/b'"),
    ({"a": np.ones(1, np.complex64)}, TypeError, "'a' holds complex64; a"),
    ({"a": "text"}, TypeError, "'a' holds str; a weights file holds arrays of"),
    ({"a": jax.random.key(0)}, TypeError, r"'a' holds key<fry>; a"),
  ],
)
def test_what_no_file_holds(tree, error, message, tmp_path):
  with pytest.raises(error, match=message):
    named_arrays(tree)
  with pytest.raises(error, match=message):
    write_weights(tmp_path / "model.npz", tree)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("tree", "error", "message"),
  [
    ({}, WeightsError, "there is no array; give one at least"),
    ([], WeightsError, "there is no array; give one at least"),
    ({"a": None}, WeightsError, "there is no array; give one at least"),
    (None, TypeError, "is a NoneType without a name; give name -> array"),
    (np.ones(2), TypeError, "is a ndarray without a name; give name -> array"),
    (Variables(SMALL, SMALL), TypeError, r"give named_variables\(variables\)"),
  ],
)
def test_what_has_no_names(tree, error, message, tmp_path):
  with pytest.raises(error, match=message):
    write_weights(tmp_path / "model.npz", tree)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("content", [b"", b"hello", b"\x09", b"\x80" * 9])
def test_what_is_no_file_of_its_format(suffix, content, tmp_path):
  path = tmp_path / f"model{suffix}"
  path.write_bytes(content)
  with pytest.raises(WeightsError) as caught:
    read_weights(path)
  kind = suffix[1:]
  assert re.fullmatch(
    rf".* is damaged \((it is no {kind} file, or truncated|it holds a int, no"
    r" names)\); get or write it again\.",
    str(caught.value),
  )


def test_metadata_are_texts(tmp_path):
  with pytest.raises(TypeError, match=r"metadata\['round'\]=7 is a int; give"):
    write_weights(tmp_path / "model.npz", SMALL, {"round": 7})  # type: ignore[dict-item]


def test_a_missing_folder_and_a_missing_file(tmp_path):
  with pytest.raises(OSError, match="give an existing, writable folder"):
    write_weights(tmp_path / "none" / "model.npz", SMALL)
  with pytest.raises(FileNotFoundError):
    read_weights(tmp_path / "model.npz")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "safetensors", None)
  with pytest.raises(
    ModuleNotFoundError,
    match=r"needs safetensors.* pip install 'fedjax_sim\[safetensors\]'",
  ):
    write_weights(tmp_path / "model.safetensors", SMALL)
  write_weights(tmp_path / "model.npz", SMALL)
