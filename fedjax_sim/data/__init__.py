"""Federated data: in memory, partitioned, split, and loaded from files.

A loader takes keywords only and returns a `FederatedDataset`. Every loader
accepts `path` (one without files ignores it) and the options of `make_dataset`:
`heldout_fraction`, `unseen_clients`, `min_examples`, `seed`. A loader of data
without clients of its own also takes `num_clients`, `partition` and the
partitioner's options.
"""

from collections.abc import Callable, Mapping

from fedjax_sim.data.digits import load_digits
from fedjax_sim.data.federated import (
  FederatedData,
  FederatedDataset,
  Prepare,
  as_stored,
  check_labels,
)
from fedjax_sim.data.npz import load_npz
from fedjax_sim.data.partition import PARTITIONERS
from fedjax_sim.data.splits import (
  make_dataset,
  split_clients,
  split_off_clients,
)

DATASETS: Mapping[str, Callable[..., FederatedDataset]] = {
  "digits": load_digits,
  "npz": load_npz,
}

__all__ = [
  "DATASETS",
  "PARTITIONERS",
  "FederatedData",
  "FederatedDataset",
  "Prepare",
  "as_stored",
  "check_labels",
  "load_digits",
  "load_npz",
  "make_dataset",
  "split_clients",
  "split_off_clients",
]
