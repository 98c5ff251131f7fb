"""Small files of made-up examples, laid out as those that others publish."""

import h5py
import numpy as np


def kaggle_heartbeats(folder, train=40, test=20):
  """`mitbih_train.csv` and `mitbih_test.csv`, sorted by class as Kaggle's."""
  rng = np.random.default_rng(0)
  for part, rows in (("train", train), ("test", test)):
    x = rng.uniform(size=(rows, 187))
    y = np.sort(rng.integers(0, 5, rows))
    np.savetxt(
      folder / f"mitbih_{part}.csv", np.column_stack([x, y]), "%.18e", ","
    )


def fed_emnist(folder, clients=3):
  """`fed_emnist_train.h5` and `fed_emnist_test.h5`, as TFF publishes them."""

  def write(group, rng, size):
    group["pixels"] = rng.uniform(size=(size, 28, 28)).astype(np.float32)
    group["label"] = rng.integers(0, 62, size).astype(np.int32)

  names = [f"f{i:04d}_{i:02d}" for i in range(clients)]
  _tff(folder, "fed_emnist", names, write)


def fed_cifar100(folder, clients=3):
  """`fed_cifar100_train.h5` and `fed_cifar100_test.h5`, likewise."""

  def write(group, rng, size):
    group["coarse_label"] = rng.integers(0, 20, size).astype(np.int64)
    group["image"] = rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
    group["label"] = rng.integers(0, 100, size).astype(np.int64)

  _tff(folder, "fed_cifar100", [str(i) for i in range(clients)], write)


def _tff(folder, name, clients, write):
  """Write `examples/<client>/<field>` into a file for each of two splits."""
  rng = np.random.default_rng(0)
  for part, size in (("train", 6), ("test", 2)):
    with h5py.File(folder / f"{name}_{part}.h5", "w") as file:
      for client in clients:
        write(file.create_group(f"examples/{client}"), rng, size)
