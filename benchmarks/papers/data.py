"""Data sets of the papers that the library's loaders lack; all from MNIST."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from fedjax_sim.data import (
  FederatedData,
  FederatedDataset,
  from_bytes,
  load_mnist,
  make_dataset,
)
from fedjax_sim.data.federated import offsets_of

Path = str | os.PathLike[str] | None
ROTATIONS = 4
DIGITS = 10


def two_digits_each(
  *,
  path: Path = None,
  num_clients: int = 20,
  heldout_fraction: float = 0.25,
  seed: int = 0,
) -> FederatedDataset:
  """Load MNIST as pFedMe has it: two digits a client, standardized pixels.

  Client i has digits i % 10 and (i + 1) % 10. Owners of a digit take, one after
  the other, a share from 0.2 to 0.5 of what is left, the last one the rest. All
  70,000 images are dealt; the central test set are all held-out examples.
  """
  train, test = _mnist(path)
  x = np.concatenate([train["x"], test["x"]]).astype(np.float32)
  y = np.concatenate([train["y"], test["y"]]).astype(np.int32)
  x = (x - x.mean(axis=0)) / (x.std(axis=0) + 0.001)
  rng = np.random.default_rng(seed)
  owner = np.zeros(len(y), np.int64)
  for digit in range(DIGITS):
    rows = rng.permutation(np.flatnonzero(y == digit))
    owners = [k for k in range(num_clients) if (digit - k) % DIGITS <= 1]
    for k in owners[:-1]:
      count = int(rng.uniform(0.2, 0.5) * len(rows))
      owner[rows[:count]], rows = k, rows[count:]
    owner[rows] = owners[-1]
  dataset = make_dataset(
    "mnist_two_digits",
    FederatedData.from_assignment({"x": x, "y": y}, owner, num_clients),
    num_classes=DIGITS,
    heldout_fraction=heldout_fraction,
    seed=seed,
  )
  assert dataset.seen is not None
  return dataclasses.replace(dataset, test=dataset.seen.examples)


def rotated_mnist(
  *,
  path: Path = None,
  num_clients: int = 4800,
  kept: int | None = None,
  seed: int = 0,
) -> FederatedDataset:
  """Load MNIST four times, rotated by 0, 90, 180 and 270 degrees.

  Each quarter of the clients shares the 60,000 images of one rotation. The
  central test set has the 10,000 test images, rotation after rotation. Of the
  clients `kept` stay, as many of each rotation; None: all.
  """
  train, test = _mnist(path)
  rng = np.random.default_rng(seed)
  orders = [rng.permutation(len(train["y"])) for _ in range(ROTATIONS)]
  x = [np.rot90(train["x"][o], k, (1, 2)) for k, o in enumerate(orders)]
  examples = {
    "x": np.concatenate(x),
    "y": np.concatenate([train["y"][order] for order in orders]),
  }
  each, rest = divmod(len(examples["y"]), num_clients)
  if rest or num_clients % ROTATIONS:
    raise ValueError(
      f"data.num_clients={num_clients} does not divide the images of each"
      " rotation; give 1200, 2400 or 4800."
    )
  data = FederatedData(
    examples=examples, offsets=offsets_of(np.full(num_clients, each))
  )
  if kept is not None:
    data = data.select(np.arange(kept) * num_clients // kept)
  turned = [np.rot90(test["x"], k, (1, 2)) for k in range(ROTATIONS)]
  return make_dataset(
    "rotated_mnist",
    data,
    num_classes=DIGITS,
    test={"x": np.concatenate(turned), "y": np.tile(test["y"], ROTATIONS)},
    seed=seed,
    prepare=from_bytes,
  )


def _mnist(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Return the training and the test images with their labels."""
  stored = load_mnist(path=path, num_clients=1, partition="stored_order")
  assert stored.test is not None
  return dict(stored.train.examples), dict(stored.test)
