"""MNIST as three federated data sets, on a small copy and on the real one."""

import gzip
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import (
  load_mnist,
  load_mnist_power_law,
  load_mnist_writers,
)

LOADERS = [load_mnist, load_mnist_power_law, load_mnist_writers]
LABELS = {"train": np.arange(300) % 10, "t10k": np.arange(20) % 10}


def write(file, array, pack):
  head = struct.pack(f">i{array.ndim}i", 0x800 + array.ndim, *array.shape)
  data = head + array.astype(np.uint8).tobytes()
  file.write_bytes(gzip.compress(data) if pack else data)


@pytest.fixture
def folder(tmp_path):
  """Images whose first pixels are the number of the example."""
  mnist, writers = tmp_path / "mnist", tmp_path / "mnist_writers"
  mnist.mkdir()
  writers.mkdir()
  for stem, y in LABELS.items():
    number = np.arange(len(y))
    x = np.zeros((len(y), 28, 28), np.uint8)
    x[:, 0, 0], x[:, 0, 1] = number // 100, number % 100
    x[:, 5, 7] = 255
    packed = stem == "train"
    end = ".gz" if packed else ""
    write(mnist / f"{stem}-images-idx3-ubyte{end}", x, packed)
    write(mnist / f"{stem}-labels-idx1-ubyte{end}", y, packed)
  np.savez(
    writers / "mnist_writer_ids.npz",
    train_writer=(2000 + np.arange(300) % 7).astype(np.int16),
    test_writer=(2500 + np.arange(20) % 3).astype(np.int16),
  )
  return tmp_path


def numbers(examples):
  x = examples["x"].astype(int)
  return x[:, 0, 0, 0] * 100 + x[:, 0, 1, 0]


def parts(data):
  sets = [data.train, data.seen, data.unseen]
  return [part.examples for part in sets if part is not None]


@pytest.mark.parametrize(
  ("load", "options"),
  [
    (load_mnist, {"num_clients": 12, "alpha": 0.1, "unseen_clients": 2}),
    (load_mnist, {"num_clients": 12, "partition": "iid"}),
    (load_mnist_power_law, {"num_clients": 20, "unseen_clients": 0.25}),
  ],
)
def test_a_partition_loses_and_doubles_nothing(folder, load, options):
  data = load(path=folder, heldout_fraction=0.2, **options)
  owned = [numbers(part) for part in parts(data)]
  np.testing.assert_array_equal(np.sort(np.concatenate(owned)), np.arange(300))
  for part in parts(data):  # an image has kept its label
    np.testing.assert_array_equal(numbers(part) % 10, part["y"])
  np.testing.assert_array_equal(numbers(data.test), np.arange(20))
  clients = [data.train, *([data.unseen] if data.unseen else [])]
  assert sum(part.num_clients for part in clients) == options["num_clients"]


def test_two_digits_a_client(folder):
  data = load_mnist_power_law(
    path=folder, num_clients=20, heldout_fraction=0, seed=3
  )
  for i in range(20):
    digits, counts = np.unique(data.train.client(i)["y"], return_counts=True)
    assert set(digits) == {i % 10, (i + 1) % 10}
    assert counts.min() >= 5
  other = load_mnist_power_law(path=folder, num_clients=20, heldout_fraction=0)
  assert (data.train.sizes != other.train.sizes).any()


def test_writers(folder):
  data = load_mnist_writers(path=folder, heldout_fraction=0.1, min_examples=7)
  assert data.seen
  assert data.unseen
  assert data.train.names == tuple(str(2000 + i) for i in range(7))
  assert data.seen.names == data.train.names
  assert data.unseen.names == ("2500", "2501")  # 2502 has 6 digits
  for i in range(7):
    client, held = data.train.client(i), data.seen.client(i)
    mine = np.sort(np.concatenate([numbers(client), numbers(held)]))
    np.testing.assert_array_equal(mine, np.arange(i, 300, 7))
  np.testing.assert_array_equal(
    numbers(data.unseen.client(1)), np.arange(1, 20, 3)
  )
  np.testing.assert_array_equal(numbers(data.test), np.arange(20))


@pytest.mark.parametrize("load", LOADERS)
def test_stored_and_prepared(folder, load):
  options = {"num_clients": 10} if load is not load_mnist_writers else {}
  data = load(path=folder, **options)
  assert (data.num_classes, data.example_shape) == (10, (28, 28, 1))
  stored = data.train.examples
  assert [str(stored[field].dtype) for field in "xy"] == ["uint8", "uint8"]
  ready = data.prepare({k: jnp.asarray(v[:4]) for k, v in stored.items()})
  assert (ready["x"].dtype, ready["y"].dtype) == (jnp.float32, jnp.int32)
  assert ready["x"].shape == (4, 28, 28, 1)
  np.testing.assert_allclose(ready["x"], stored["x"][:4] / 255.0, rtol=1e-6)
  assert ready["x"][0, 5, 7, 0] == 1
  np.testing.assert_array_equal(ready["y"], stored["y"][:4])


@pytest.mark.parametrize(
  ("load", "options", "match"),
  [
    (load_mnist, {"alhpa": 1}, "not take 'alhpa'. Did you mean"),
    (load_mnist, {"num_clients": 301}, "needs 301 examples"),
    (load_mnist_power_law, {"num_clients": 15}, "give a multiple of 10"),
    (load_mnist_power_law, {"num_clients": 40}, "needs 40 examples of digit 0"),
    (load_mnist_power_law, {"num_clients": 0}, "num_clients=0 is out of range"),
    (load_mnist_writers, {"min_examples": 500}, "leaves no client"),
  ],
)
def test_refuses(folder, load, options, match):
  with pytest.raises(ValueError, match=match):
    load(path=folder, **options)


def test_refuses_files_that_do_not_fit(folder):
  labels = folder / "mnist" / "t10k-labels-idx1-ubyte"
  whole = labels.read_bytes()
  write(labels, LABELS["t10k"][:19], False)
  with pytest.raises(ValueError, match=r"t10k-labels.*\(20,\), found \(19,\)"):
    load_mnist(path=folder)
  write(labels, LABELS["t10k"] + 1, False)
  with pytest.raises(ValueError, match=r"test: field 'y' .*holds label 10"):
    load_mnist(path=folder)
  labels.write_bytes(whole)
  np.savez(
    folder / "mnist_writers" / "mnist_writer_ids.npz",
    train_writer=np.zeros(299, int),
    test_writer=np.zeros(20, int),
  )
  with pytest.raises(ValueError, match=r"train_writer: expected \(300,\)"):
    load_mnist_writers(path=folder)
  np.savez(
    folder / "mnist_writers" / "mnist_writer_ids.npz",
    train_writer=np.arange(300),
    test_writer=np.arange(290, 310),
  )
  with pytest.raises(ValueError, match="writer 290 is in train_writer and in"):
    load_mnist_writers(path=folder)
  labels.unlink()
  with pytest.raises(FileNotFoundError, match=r"holds no t10k-labels"):
    load_mnist(path=folder)


# --- the real files -----------------------------------------------------------


def rows(*sets):
  """Every image and label as bytes, sorted."""
  x = np.concatenate([s["x"].reshape(-1, 784) for s in sets])
  y = np.concatenate([s["y"] for s in sets])
  joined = np.ascontiguousarray(np.column_stack([x, y]))
  return np.sort(joined.view("V785").ravel().view("S785"))


@pytest.fixture(scope="module")
def published(data_folder):
  """Training images and labels as numpy reads the files, without a loader."""

  def read(name, skip):
    file = data_folder / "mnist" / f"{name}-ubyte.gz"
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8)[skip:]

  x = read("train-images-idx3", 16).reshape(60000, 28, 28, 1)
  return {"x": x, "y": read("train-labels-idx1", 8)}


@pytest.mark.parametrize(
  ("load", "options", "held"),
  [
    (load_mnist, {}, 0),
    (load_mnist_power_law, {}, 5977),
    (load_mnist_writers, {"heldout_fraction": 0.1}, None),
  ],
)
def test_real(data_folder, published, load, options, held):
  data = load(path=data_folder, **options)
  sets = [data.train.examples, *([data.seen.examples] if data.seen else [])]
  np.testing.assert_array_equal(rows(*sets), rows(published))
  assert sum(len(part["y"]) for part in sets) == 60_000
  if held is not None:
    assert data.train.num_examples == 60_000 - held
  assert len(data.test["y"]) == 10_000
  assert data.train.examples["x"].dtype == np.uint8


def test_real_power_law(data_folder):
  data = load_mnist_power_law(path=data_folder, heldout_fraction=0)
  assert (data.train.num_clients, data.train.num_examples) == (1000, 60_000)
  assert data.train.sizes.min() >= 10
  for i in range(1000):
    assert set(data.train.client(i)["y"]) == {i % 10, (i + 1) % 10}


def test_real_writers(data_folder):
  data = load_mnist_writers(path=data_folder)
  assert data.unseen
  assert data.train.num_clients == 539
  assert (data.train.sizes.min(), data.train.sizes.max()) == (19, 131)
  assert np.median(data.train.sizes) == 116
  assert data.unseen.num_clients == 297
  assert data.unseen.num_examples == 10_000
  assert data.train.names
  assert data.unseen.names
  assert not set(data.train.names) & set(data.unseen.names)
  np.testing.assert_array_equal(rows(data.unseen.examples), rows(data.test))
