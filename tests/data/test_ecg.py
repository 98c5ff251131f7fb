"""Heartbeats by patient record, on a small copy and on the real file."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import load_ecg


@pytest.fixture
def save(tmp_path):
  (tmp_path / "ecg_mitbih").mkdir()

  def write(**changes):
    fields: dict[str, Any] = {
      "x": np.arange(12 * 187).reshape(12, 187).astype(np.uint8),
      "y": (np.arange(12) % 5).astype(np.int8),
      "record": np.repeat([208, 100, 119], 4).astype(np.int16),
    } | changes
    kept = {k: v for k, v in fields.items() if v is not None}
    np.savez(tmp_path / "ecg_mitbih" / "mitbih_beats_by_patient.npz", **kept)
    return tmp_path

  return write


def pairs(examples):
  """Each beat's samples and label."""
  return [
    (bytes(x), int(y))
    for x, y in zip(examples["x"], examples["y"], strict=True)
  ]


def test_ecg(save):
  data = load_ecg(path=save(), heldout_fraction=0.25)
  assert data.seen
  assert (data.num_classes, data.example_shape) == (5, (187, 1))
  assert data.train.names == data.seen.names == ("100", "119", "208")
  assert data.train.sizes.tolist() == [3, 3, 3]
  x = np.arange(12 * 187).reshape(12, 187).astype(np.uint8)
  y = (np.arange(12) % 5).astype(np.int8)
  for i, rows in enumerate((slice(4, 8), slice(8, 12), slice(0, 4))):
    both = pairs(data.train.client(i)) + pairs(data.seen.client(i))
    assert sorted(both) == sorted(pairs({"x": x[rows], "y": y[rows]}))


def test_prepare(save):
  data = load_ecg(path=save())
  stored = data.train.examples
  assert [str(stored[field].dtype) for field in "xy"] == ["uint8", "int8"]
  ready = data.prepare({k: jnp.asarray(v) for k, v in stored.items()})
  assert (ready["x"].dtype, ready["y"].dtype) == (jnp.float32, jnp.int32)
  np.testing.assert_allclose(ready["x"], stored["x"] / 255.0, rtol=1e-6)
  np.testing.assert_array_equal(ready["y"], stored["y"])


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"record": None}, r"patient.npz: record: expected an array .* none of th"),
    ({"x": np.zeros((12, 186), np.uint8)}, r"x: expected \(any, 187\), found"),
    ({"x": np.zeros((12, 187))}, "dtype of x: expected integers, found float"),
    ({"x": np.zeros((12, 187), int)}, "dtype of x: expected uint8, found int"),
    ({"y": np.zeros(11, int)}, r"shape of y: expected \(12,\), found \(11,\)"),
    ({"record": np.zeros((12, 1), int)}, r"shape of record: expected \(any,\)"),
    ({"y": np.full(12, 5)}, "holds label 5; give labels from 0 to 4"),
    ({"y": np.full(12, -1)}, "holds label -1"),
  ],
)
def test_refuses(save, changes, match):
  with pytest.raises(ValueError, match=match):
    load_ecg(path=save(**changes))


def test_refuses_a_folder_without_the_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no mitbih_beats_by_pati"):
    load_ecg(path=tmp_path)


def test_real(data_folder):
  data = load_ecg(path=data_folder)
  assert data.seen
  assert data.train.names
  sizes = data.train.sizes + data.seen.sizes
  assert data.train.num_clients == 48
  assert (sizes.min(), sizes.max(), sizes.sum()) == (250, 754, 18_796)
  np.testing.assert_array_equal(data.seen.sizes, np.rint(0.2 * sizes))
  assert data.train.examples["x"].dtype == np.uint8
  file = data_folder / "ecg_mitbih" / "mitbih_beats_by_patient.npz"
  with np.load(file) as beats:
    saved = {field: beats[field] for field in ("x", "y", "record")}
  for i, name in enumerate(data.train.names):
    mine = saved["record"] == int(name)
    both = pairs(data.train.client(i)) + pairs(data.seen.client(i))
    expected = pairs({"x": saved["x"][mine], "y": saved["y"][mine]})
    assert sorted(both) == sorted(expected)
