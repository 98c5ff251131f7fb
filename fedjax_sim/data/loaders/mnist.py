"""MNIST: 70,000 handwritten digits, as three federated data sets.

All read MNIST's four idx files, plain or gzipped, and store the images as the
bytes that they are; `from_bytes` scales a batch to 0..1 on the device.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.array_files import read_fields, read_idx
from fedjax_sim.data.batch_steps import from_bytes
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.location import find, locate
from fedjax_sim.data.partition import by_key, deal
from fedjax_sim.data.seeding import Stream, generator
from fedjax_sim.data.splits import Clients, make_dataset

CLASSES = 10
FIRST_EXAMPLES = 5  # of each of its two digits that a power-law client has


def load_mnist(
  *,
  path: str | os.PathLike[str] | None = None,
  num_clients: int = 100,
  partition: str = "dirichlet",
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
  **options: Any,
) -> FederatedDataset:
  """Load MNIST: training images partitioned over clients, and its test set.

  Fields: x, (28, 28, 1), uint8; y, (), uint8.

  Args:
    path: the folder that holds `mnist/`; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
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
  train, test = _images(locate(path))
  dealt = deal(
    train, partition, num_clients, seed, min_examples=min_examples, **options
  )
  return make_dataset(
    "mnist",
    dealt,
    num_classes=CLASSES,
    test=test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=from_bytes,
  )


def load_mnist_power_law(
  *,
  path: str | os.PathLike[str] | None = None,
  num_clients: int = 1000,
  heldout_fraction: float = 0.1,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Load MNIST with two digits a client, and sizes by a heavy-tailed law.

  After Li et al. (2020, "Federated optimization in heterogeneous networks",
  arXiv 1812.06127), as FedProx and FedML benchmark it: client i has digits
  i % 10 and (i + 1) % 10, five examples of each, and shares what is left of a
  digit with its other owners in proportion to draws from lognormal(0, 2).

  The authors' script mixes MNIST's training and test images, standardizes each
  pixel, and leaves over what whole numbers of examples do not use up. Here
  clients share the 60,000 training images, every one of them, in an order that
  `seed` shuffles; the test set is MNIST's own, and pixels go from 0 to 1.

  Fields: as `load_mnist`.

  Args:
    path: the folder that holds `mnist/`; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    num_clients: a multiple of 10, unseen ones included.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: clients with fewer are left out.
    seed: of sizes, examples and splits.

  Raises:
    FileNotFoundError: a file is missing.
    TypeError, ValueError: a file is damaged, or an option is refused.
  """
  num_clients = validate.integer("data.num_clients", num_clients)
  if num_clients % CLASSES:
    raise ValueError(
      f"data.num_clients={num_clients} does not give every digit as many"
      f" clients; give a multiple of {CLASSES}."
    )
  train, test = _images(locate(path))
  client_of = _two_digits_each(train["y"], num_clients, seed)
  return make_dataset(
    "mnist_power_law",
    FederatedData.from_assignment(train, client_of, num_clients),
    num_classes=CLASSES,
    test=test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=from_bytes,
  )


def load_mnist_writers(
  *,
  path: str | os.PathLike[str] | None = None,
  heldout_fraction: float = 0.0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Load MNIST by the people who wrote it, as QMNIST found them out.

  Yadav and Bottou (2019, "Cold case: the lost MNIST digits", arXiv 1905.10498)
  matched MNIST with NIST's forms. The writers of the training images train.
  Those of the test images, all others, are `unseen`; their images are the
  central test set as well.

  Fields: as `load_mnist`. Clients are named by the writer's number.

  Args:
    path: the folder that holds `mnist/` and `mnist_writers/`; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    min_examples: writers with fewer are left out.
    seed: of the split.

  Raises:
    FileNotFoundError: a file is missing.
    TypeError, ValueError: a file is damaged, or an option is refused.
  """
  root = locate(path)
  train, test = _images(root)
  writers = read_fields(
    find(root / "mnist_writers", "mnist_writer_ids.npz"),
    {"train_writer": (len(train["y"]),), "test_writer": (len(test["y"]),)},
  )
  train_of, train_names = by_key(writers["train_writer"])
  test_of, test_names = by_key(writers["test_writer"])
  if both := sorted(set(train_names) & set(test_names)):
    raise ValueError(
      f"{root / 'mnist_writers'}: writer {both[0]} is in train_writer and in"
      " test_writer; expected every writer in one."
    )
  dataset = make_dataset(
    "mnist_writers",
    FederatedData.from_assignment(train, train_of, names=train_names),
    num_classes=CLASSES,
    test=test,
    heldout_fraction=heldout_fraction,
    min_examples=min_examples,
    seed=seed,
    prepare=from_bytes,
  )
  unseen = FederatedData.from_assignment(test, test_of, names=test_names)
  return dataclasses.replace(dataset, unseen=unseen.at_least(min_examples))


def _images(root: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Read training and test images, with their labels."""

  def read(stem: str) -> dict[str, np.ndarray]:
    images = f"{stem}-images-idx3-ubyte"
    labels = f"{stem}-labels-idx1-ubyte"
    folder = root / "mnist"
    x = read_idx(find(folder, images, f"{images}.gz"), (None, 28, 28))
    y = read_idx(find(folder, labels, f"{labels}.gz"), (len(x),))
    return {"x": x[..., np.newaxis], "y": y}

  return read("train"), read("t10k")


def _two_digits_each(
  labels: np.ndarray, num_clients: int, seed: int
) -> np.ndarray:
  """Return `client_of`, shape=(num_examples,), of the power-law clients."""
  rng = generator(seed, Stream.PARTITION)
  clients = np.arange(num_clients)
  client_of = np.zeros(len(labels), np.int64)
  for digit in range(CLASSES):
    rows = rng.permutation(np.flatnonzero(labels == digit))
    owners = clients[(digit - clients) % CLASSES <= 1]
    rest = len(rows) - FIRST_EXAMPLES * len(owners)
    if rest < 0:
      raise ValueError(
        f"data.num_clients={num_clients} needs {len(rows) - rest} examples of"
        f" digit {digit}, but there are {len(rows)}; lower it."
      )
    shares = np.cumsum(rng.lognormal(0, 2, len(owners)))
    ends = np.rint(rest * (shares / shares[-1])).astype(np.int64)
    sizes = FIRST_EXAMPLES + np.diff(ends, prepend=0)
    client_of[rows] = np.repeat(owners, sizes)
  return client_of
