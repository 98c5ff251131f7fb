"""Handwritten digits that scikit-learn brings along: a first data set.

1,797 gray images of 8 x 8 pixels in 10 classes (UCI ML repository, E. Alpaydin
and C. Kaynak, 1998). No download, no files.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
from typing import Any

import numpy as np

from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.partition import deal
from fedjax_sim.data.seeding import Stream
from fedjax_sim.data.splits import Clients, make_dataset, split_clients

TEST_FRACTION = 0.2


def load_digits(
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
  """Load scikit-learn's digits, partitioned over clients, and a test set.

  Fields: x, (64,), float32 from 0 to 1; y, (), int32. A fifth of each class is
  the test set, the same for every partition of one seed.

  Args:
    path: not used; the data comes with scikit-learn.
    num_clients: how many clients, unseen ones included.
    partition: how examples are dealt to clients: a name of `PARTITIONERS`, or
      a reference.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: of each client.
    seed: of test set, partition and splits.
    **options: of the partitioner, such as `alpha`.

  Raises:
    ImportError: scikit-learn is not installed.
    TypeError, ValueError: an option is unknown or out of range.
  """
  del path
  pixels, labels = _read()
  examples = {
    "x": (pixels / 16).astype(np.float32),
    "y": labels.astype(np.int32),
  }
  # Classes in the place of clients: a test set with every class in proportion.
  by_class = FederatedData.from_assignment(examples, labels)
  rest, test = split_clients(by_class, TEST_FRACTION, seed, Stream.TEST)
  dealt = deal(
    rest.examples,
    partition,
    num_clients,
    seed,
    min_examples=min_examples,
    **options,
  )
  return make_dataset(
    "digits",
    dealt,
    num_classes=10,
    test=test.examples,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
  )


def _read() -> tuple[np.ndarray, np.ndarray]:
  """Return the pixels, from 0 to 16, and the labels of all digits.

  From scikit-learn's file: importing it takes as long as importing JAX.
  """
  found = importlib.util.find_spec("sklearn")
  if found is None:
    raise ImportError(
      "data.name='digits' needs scikit-learn: pip install scikit-learn."
    )
  for folder in found.submodule_search_locations or ():
    path = pathlib.Path(folder, "datasets", "data", "digits.csv.gz")
    if path.exists():
      table = _table(path)
      return table[:, :-1], table[:, -1].astype(int)
  from sklearn import datasets  # a version that keeps it elsewhere

  pixels, labels = datasets.load_digits(return_X_y=True)
  return pixels, labels


@functools.cache  # reading the text takes longer than dealing it to clients
def _table(path: pathlib.Path) -> np.ndarray:
  table = np.loadtxt(path, delimiter=",")
  table.setflags(write=False)
  return table
