"""CIFAR-10: color photographs in 10 classes, from its files or PNG sprites.

Krizhevsky (2009, "Learning multiple layers of features from tiny images"). A
row of a sprite is an image: 32 x 32 RGB pixels, one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.data.array_files import read_fields
from fedjax_sim.data.batch_steps import from_bytes, normalize
from fedjax_sim.data.cifar_batches import read_batch
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import Examples
from fedjax_sim.data.location import find, locate
from fedjax_sim.data.partition import deal
from fedjax_sim.data.splits import Clients, make_dataset

CLASSES = 10
BATCHES = "cifar-10-batches-py"
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
ROWS = 1000  # images of a full sprite
FIRST_TEST_SPRITE = 50
# Of the 50,000 training images.
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STDDEV = np.array([0.2470, 0.2435, 0.2616], np.float32)


def prepare(examples: Mapping[str, Any]) -> dict[str, Any]:
  """Scale pixels to mean 0, variance 1 a channel; make labels int32."""
  return normalize(from_bytes(examples), mean=MEAN, stddev=STDDEV)


def load_cifar10(
  *,
  path: str | os.PathLike[str] | None = None,
  num_clients: int = 20,
  partition: str = "dirichlet",
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
  **options: Any,
) -> FederatedDataset:
  """Load CIFAR-10: training images partitioned over clients, and a test set.

  They are in `cifar-10-batches-py/`, as their page offers them, or else in
  `cifar10/`, as sprites. There `labels.npz` says by the lengths of `train_y`
  and `test_y` how many images there are. Sprites hold 1,000 each, the last what
  is left over: number 0 and on for training, 50 and on for testing.

  Fields: x, (32, 32, 3), uint8; y, (), uint8.

  Args:
    path: the folder that holds one of the two; relative to the working folder,
      or else to the folder that FEDJAX_SIM_DATA names.
    num_clients: how many clients, unseen ones included.
    partition: how examples are dealt to clients: a name of `PARTITIONERS`, or
      a reference.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: of each client.
    seed: of partition and splits.
    **options: of the partitioner, such as `alpha`.

  Raises:
    FileNotFoundError: a file is missing.
    TypeError, ValueError: a file is damaged, or an option is refused.
  """
  root = locate(path)
  read = _batches if (root / BATCHES).is_dir() else _sprites
  train, test = read(root)
  dealt = deal(
    train, partition, num_clients, seed, min_examples=min_examples, **options
  )
  return make_dataset(
    "cifar10",
    dealt,
    num_classes=CLASSES,
    test=test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=prepare,
  )


def _batches(root: Path) -> tuple[Examples, Examples]:
  """Read training and test images from the files of CIFAR-10's page."""
  parts = [
    read_batch(find(root / BATCHES, name), "labels") for name in TRAIN_BATCHES
  ]
  train = {
    field: np.concatenate([part[field] for part in parts]) for field in "xy"
  }
  return train, read_batch(find(root / BATCHES, "test_batch"), "labels")


def _sprites(root: Path) -> tuple[Examples, Examples]:
  """Read training and test images from sprites."""
  folder = root / "cifar10"
  labels = read_fields(
    find(folder, "labels.npz"), {"train_y": (None,), "test_y": (None,)}
  )
  train = _examples(folder, 0, labels["train_y"])
  return train, _examples(folder, FIRST_TEST_SPRITE, labels["test_y"])


def _examples(
  folder: Path, first: int, labels: np.ndarray
) -> dict[str, np.ndarray]:
  """Read the images of these labels, from sprites number `first` on."""
  images = [np.zeros((0, 32, 32, 3), np.uint8)]
  for number, start in enumerate(range(0, len(labels), ROWS), first):
    file = find(folder, f"cifar10_batch_{number}.png")
    images.append(_sprite(file, min(ROWS, len(labels) - start)))
  return {"x": np.concatenate(images), "y": labels}


def _sprite(file: Path, rows: int) -> np.ndarray:
  """Read a sprite's images, shape=(rows, 32, 32, 3), uint8."""
  from PIL import Image  # here, as it takes a while

  try:
    with Image.open(file) as image:
      found = (*image.size, image.mode)
      pixels = np.asarray(image)
  except (OSError, SyntaxError, ValueError) as error:  # as PIL calls damage
    raise ValueError(
      f"{file} cannot be read as PNG: {error}. Get it again."
    ) from error
  if found != (1024, rows, "RGB"):
    width, height, mode = found
    raise ValueError(
      f"{file}: size: expected 1024 x {rows} RGB pixels, an image a row as"
      f" labels.npz counts them, found {width} x {height} {mode}."
    )
  return pixels.reshape(rows, 32, 32, 3)
