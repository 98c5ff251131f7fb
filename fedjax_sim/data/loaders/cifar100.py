"""CIFAR-100: color photographs in 100 classes, as their page offers them.

Krizhevsky (2009, "Learning multiple layers of features from tiny images").
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_sim.data.batch_steps import from_bytes, normalize
from fedjax_sim.data.cifar_batches import read_batch
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.location import find, locate
from fedjax_sim.data.partition import deal
from fedjax_sim.data.splits import Clients, make_dataset

CLASSES = 100
FOLDER = "cifar-100-python"
# Of the 50,000 training images.
MEAN = np.array([0.5071, 0.4865, 0.4409], np.float32)
STDDEV = np.array([0.2673, 0.2564, 0.2762], np.float32)


def prepare(examples: Mapping[str, Any]) -> dict[str, Any]:
  """Scale pixels to mean 0, variance 1 a channel; make labels int32."""
  return normalize(from_bytes(examples), mean=MEAN, stddev=STDDEV)


def load_cifar100(
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
  """Load CIFAR-100: training images partitioned over clients, and a test set.

  Labels are the 100 fine ones.

  Fields: x, (32, 32, 3), uint8; y, (), uint8.

  Args:
    path: the folder that holds `cifar-100-python/` with its files `train` and
      `test`; relative to the working folder, or else to the folder that
      FEDJAX_SIM_DATA names.
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
  train, test = (
    read_batch(find(root, f"{FOLDER}/{name}", name), "fine_labels")
    for name in ("train", "test")
  )
  dealt = deal(
    train, partition, num_clients, seed, min_examples=min_examples, **options
  )
  return make_dataset(
    "cifar100",
    dealt,
    num_classes=CLASSES,
    test=test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=prepare,
  )
