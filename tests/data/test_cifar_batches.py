"""CIFAR from the files of its page: read as Python 2 pickled them."""

import os
import pickle

import numpy as np
import pytest

from fedjax_sim.data import load_cifar10, load_cifar100
from fedjax_sim.data.cifar_batches import read_batch
from shaped_files import cifar10_batches, cifar100_batches, python2_pickle


def pixel_by_pixel(x):
  """Red, green and blue planes of 32 rows, as the page describes them."""
  images = np.zeros((len(x), 32, 32, 3), np.uint8)
  for channel in range(3):
    for row in range(32):
      first = 1024 * channel + 32 * row
      images[:, row, :, channel] = x[:, first : first + 32]
  return images


def test_the_files_of_cifar10(tmp_path):
  batches = cifar10_batches(tmp_path)
  data = load_cifar10(path=tmp_path, num_clients=5, partition="stored_order")
  *train, (x, y) = batches
  found = data.train.examples
  images = pixel_by_pixel(np.concatenate([x for x, _ in train]))
  np.testing.assert_array_equal(found["x"], images)
  labels = np.concatenate([y for _, y in train])
  np.testing.assert_array_equal(found["y"], labels)
  assert data.test
  np.testing.assert_array_equal(data.test["x"], pixel_by_pixel(x))
  np.testing.assert_array_equal(data.test["y"], y)
  (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
  with pytest.raises(FileNotFoundError, match="holds no data_batch_3"):
    load_cifar10(path=tmp_path)


def test_the_files_of_cifar100(tmp_path):
  (x, y), (test_x, test_y) = cifar100_batches(tmp_path, 40)
  data = load_cifar100(path=tmp_path, num_clients=4, partition="stored_order")
  assert (data.num_classes, data.example_shape) == (100, (32, 32, 3))
  np.testing.assert_array_equal(data.train.examples["x"], pixel_by_pixel(x))
  np.testing.assert_array_equal(data.train.examples["y"], y)
  assert data.test
  np.testing.assert_array_equal(data.test["y"], test_y)
  here = load_cifar100(path=tmp_path / "cifar-100-python", num_clients=4)
  assert here.test
  np.testing.assert_array_equal(here.test["x"], pixel_by_pixel(test_x))
  ready = data.prepare({k: v[:1] for k, v in data.train.examples.items()})
  mean, stddev = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
  expected = (pixel_by_pixel(x[:1]) / 255 - mean) / stddev
  np.testing.assert_allclose(ready["x"], expected, rtol=1e-4, atol=1e-5)


class Evil:
  def __reduce__(self):
    return os.mkdir, ("made",)


@pytest.mark.parametrize(
  ("held", "message"),
  [
    (Evil(), r"is no pickle of CIFAR: it wants to call \w+\.mkdir"),
    ([1], "lacks data or labels"),
    ({b"data": np.zeros((2, 3072), np.uint8)}, "lacks data or labels"),
    (
      {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
      r"expected uint8 of shape \(1, 3072\), .* found uint8 of shape \(2, 3072",
    ),
    (
      {b"data": np.zeros((1, 3072), np.float32), b"labels": [1]},
      "found float32 of shape",
    ),
    (
      {b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]},
      "labels: expected whole numbers from 0 to 255",
    ),
  ],
)
def test_what_is_refused_and_never_run(tmp_path, monkeypatch, held, message):
  monkeypatch.chdir(tmp_path)
  file = tmp_path / "test_batch"
  evil = isinstance(held, Evil)
  file.write_bytes(pickle.dumps(held) if evil else python2_pickle(held))
  with pytest.raises(ValueError, match=message):
    read_batch(file, "labels")
  assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_damaged_file(tmp_path, share):
  cifar10_batches(tmp_path, 1)
  file = tmp_path / "cifar-10-batches-py" / "test_batch"
  whole = file.read_bytes()
  file.write_bytes(whole[: int(share * len(whole))])
  with pytest.raises(ValueError, match="test_batch is no pickle of CIFAR"):
    read_batch(file, "labels")
