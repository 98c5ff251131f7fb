"""How clients differ: the sizes and the labels of a data set, as numbers.

A run keeps them in `data_profile.json`, so that a report needs no data.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData

FILE = "data_profile.json"
_SHOWN = 60  # clients whose labels are kept one by one
_COMPARED = 1000  # clients whose labels are compared with all of theirs
_MOST_CLASSES = 1000  # whose examples are counted


def profile_of(dataset: FederatedDataset) -> dict[str, Any]:
  """Return what `data_profile.json` holds.

  Labels are those of the training clients; where these are more than
  `_COMPARED`, of so many, drawn at random, always the same.

  Returns:
    name: of the data set.
    classes: of the labels that are stored; 0: they are no classes.
    test: number of central test examples.
    sets: train, seen and unseen, where there are such clients, each with the
      number of `clients` and of `examples`, and `sizes`: pairs of a size and
      how many clients have it, in order.
    labels: None without classes; else `clients`: how many are compared, `skew`:
      the total variation distance between the labels of a client and of all
      clients compared, from 0 to 1, as the mean over those, and `shown`: the
      names, sizes and number of examples of each class of some clients, evenly
      spread over all.
  """
  sets = {
    name: data
    for name, data in dataset.parts.items()
    if name in ("train", "seen", "unseen")
  }
  test = dataset.parts.get("test")
  return {
    "name": dataset.name,
    "classes": dataset.stored_classes,
    "test": 0 if test is None else test.num_examples,
    "sets": {name: _sizes(data) for name, data in sets.items()},
    "labels": _labels(dataset.train, dataset.stored_classes),
  }


def spread(num_clients: int, most: int) -> np.ndarray:
  """Return at most so many clients, evenly spread, shape=(n,), integer."""
  chosen = np.linspace(0, num_clients - 1, most)
  return np.unique(chosen.round().astype(int))


def class_counts(
  data: FederatedData, clients: np.ndarray, num_classes: int
) -> np.ndarray:
  """Count the examples of each class, shape=(len(clients), num_classes).

  Args:
    data: clients with labels "y", from 0 to `num_classes` - 1.
    clients: shape=(n,), integer.
    num_classes: how many there are.
  """
  labels = [np.asarray(data.client(int(i))["y"]).ravel() for i in clients]
  return np.stack(
    [np.bincount(y.astype(np.int64), minlength=num_classes) for y in labels]
  )


def _sizes(data: FederatedData) -> dict[str, Any]:
  sizes, counts = np.unique(data.sizes, return_counts=True)
  pairs = zip(sizes.tolist(), counts.tolist(), strict=True)
  return {
    "clients": data.num_clients,
    "examples": data.num_examples,
    "sizes": [list(pair) for pair in pairs],
  }


def _labels(train: FederatedData, num_classes: int) -> dict[str, Any] | None:
  if not 0 < num_classes <= _MOST_CLASSES or "y" not in train.examples:
    return None
  compared = np.arange(train.num_clients)
  if len(compared) > _COMPARED:  # neighbors may be alike, and every third one
    compared = np.sort(
      np.random.default_rng(0).permutation(compared)[:_COMPARED]
    )
  counts = class_counts(train, compared, num_classes)
  counts = counts.astype(float)
  all_of_them = counts.sum(0) / max(counts.sum(), 1)
  some = counts.sum(1) > 0  # an empty client has no share of any class
  shares = counts[some] / counts[some].sum(1, keepdims=True)
  distances = np.abs(shares - all_of_them).sum(1) / 2
  shown = spread(train.num_clients, _SHOWN)
  return {
    "clients": len(compared),
    "skew": float(distances.mean()) if some.any() else 0.0,
    "shown": [
      {
        "name": train.client_name(int(i)),
        "size": int(train.sizes[i]),
        "counts": row.tolist(),
      }
      for i, row in zip(
        shown, class_counts(train, shown, num_classes), strict=True
      )
    ],
  }
