"""Federated data: in memory, partitioned, split, and loaded from files.

A loader takes keywords only and returns a `FederatedDataset`. Every loader
accepts `path` (one without files ignores it) and the options of `make_dataset`:
`heldout_fraction`, `unseen_clients`, `min_examples`, `seed`; only
`mnist_writers`, whose unseen clients are given, has no `unseen_clients`. A
loader of data without clients of its own also takes `num_clients`, `partition`
and the partitioner's options.
"""

from collections.abc import Callable, Mapping

from fedjax_sim.data.array_files import read_npz
from fedjax_sim.data.batch_steps import (
  Augment,
  Prepare,
  as_stored,
  from_bytes,
  prepared_shapes,
)
from fedjax_sim.data.dataset import FederatedDataset, check_labels
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.loaders.cifar10 import load_cifar10
from fedjax_sim.data.loaders.cifar100 import load_cifar100
from fedjax_sim.data.loaders.digits import load_digits
from fedjax_sim.data.loaders.ecg import load_ecg
from fedjax_sim.data.loaders.ecg_kaggle import load_ecg_kaggle
from fedjax_sim.data.loaders.leaf import load_leaf_json
from fedjax_sim.data.loaders.mnist import (
  load_mnist,
  load_mnist_power_law,
  load_mnist_writers,
)
from fedjax_sim.data.loaders.npz import load_npz
from fedjax_sim.data.loaders.shakespeare import load_shakespeare
from fedjax_sim.data.loaders.synthetic import load_synthetic
from fedjax_sim.data.location import is_url, local, locate, workdir_on_disk
from fedjax_sim.data.partition import PARTITIONERS
from fedjax_sim.data.splits import (
  client_numbers,
  make_dataset,
  split_clients,
  split_off_clients,
  with_few_labels,
  with_random_labels,
  with_server_data,
)
from fedjax_sim.data.store import (
  StoreError,
  load_store,
  open_store,
  verify,
  vocabulary_of,
)
from fedjax_sim.data.store.bucket import copy_store
from fedjax_sim.data.store.rewrite import partition_store, write_store
from fedjax_sim.data.store.writer import StoreWriter
from fedjax_sim.data.stored import StoredData

DATASETS: Mapping[str, Callable[..., FederatedDataset]] = {
  "cifar10": load_cifar10,
  "cifar100": load_cifar100,
  "digits": load_digits,
  "ecg": load_ecg,
  "ecg_kaggle": load_ecg_kaggle,
  "leaf_json": load_leaf_json,
  "mnist": load_mnist,
  "mnist_power_law": load_mnist_power_law,
  "mnist_writers": load_mnist_writers,
  "npz": load_npz,
  "shakespeare": load_shakespeare,
  "store": load_store,
  "synthetic": load_synthetic,
}

__all__ = [
  "DATASETS",
  "PARTITIONERS",
  "Augment",
  "FederatedData",
  "FederatedDataset",
  "Prepare",
  "StoreError",
  "StoreWriter",
  "StoredData",
  "as_stored",
  "check_labels",
  "client_numbers",
  "copy_store",
  "from_bytes",
  "is_url",
  "load_cifar10",
  "load_cifar100",
  "load_digits",
  "load_ecg",
  "load_ecg_kaggle",
  "load_leaf_json",
  "load_mnist",
  "load_mnist_power_law",
  "load_mnist_writers",
  "load_npz",
  "load_shakespeare",
  "load_store",
  "load_synthetic",
  "local",
  "locate",
  "make_dataset",
  "open_store",
  "partition_store",
  "prepared_shapes",
  "read_npz",
  "split_clients",
  "split_off_clients",
  "verify",
  "vocabulary_of",
  "with_few_labels",
  "with_random_labels",
  "with_server_data",
  "workdir_on_disk",
  "write_store",
]
