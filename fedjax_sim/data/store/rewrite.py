"""Writes a data set as a client store, with its clients or with others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.partition import partition
from fedjax_sim.data.splits import Clients, make_dataset
from fedjax_sim.data.store.format import FURTHER, PREPARE
from fedjax_sim.data.store.writer import StoreWriter

Told = Callable[[str, int, int], None]  # split, its clients and examples so far
BLOCK = 2**24  # bytes that are written at once


def write_store(
  path: str | os.PathLike[str],
  data: FederatedDataset,
  *,
  rows: FederatedDataset | None = None,
  vocabulary: Sequence[str] | None = None,
  progress: Told | None = None,
) -> None:
  """Write a data set with all of its splits as a store.

  Args:
    path: the store's folder, which must not be there yet.
    data: the data set.
    rows: other clients to write instead of data's train, seen and unseen; the
      only field "x", shape=(examples,), has the rows of data.train's examples.
    vocabulary: see `StoreWriter`.
    progress: a function that is called with a split and how many clients and
      examples of it are written; None: none.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: the data set has what a store cannot hold.
    OSError: the disk is full.
  """
  named = {function: name for name, function in PREPARE.items()}
  if data.prepare not in named or data.augment is not None:
    raise ValueError(
      f"The data set {data.name!r} prepares its batches in a way of its own,"
      f" which a store does not know; it knows {', '.join(PREPARE)}. Write it"
      " with StoreWriter."
    )
  for name in data.splits:
    validate.one_of(f"The data set {data.name!r}: split", name, FURTHER)
  with StoreWriter(
    path,
    name=data.name,
    num_classes=data.num_classes,
    prepare=named[data.prepare],
    vocabulary=vocabulary,
  ) as store:
    of_clients = rows or data
    parts = {
      "train": of_clients.train,
      "seen": of_clients.seen,
      "unseen": of_clients.unseen,
      **of_clients.splits,
    }
    for name, part in parts.items():
      if part is None:
        continue
      split = store.split(name)
      fields = data.train.examples if rows else part.examples
      each = sum(x[:1].nbytes for x in fields.values())
      for first, last in client_blocks(part, each):
        begin, end = part.offsets[first], part.offsets[last]
        picked: Any = part.examples["x"][begin:end] if rows else None
        split.append(
          [part.client_name(i) for i in range(first, last)],
          part.sizes[first:last],
          {
            k: np.asarray(x[begin:end]) if picked is None else x[picked]
            for k, x in fields.items()
          },
        )
        if progress:
          progress(name, split.num_clients, split.num_examples)
    for name in ("test", "server"):
      examples = getattr(data, name)
      if examples is not None:
        size = len(next(iter(examples.values())))
        store.split(name).append([name], [size], examples)


def client_blocks(part: FederatedData, each: int) -> Iterator[tuple[int, int]]:
  """Yield runs of clients, (first, one past the last), of about `BLOCK` bytes.

  Args:
    part: the clients.
    each: bytes of an example.
  """
  rows = max(1, BLOCK // max(each, 1))
  first = 0
  while first < part.num_clients:
    end = part.offsets[first] + rows
    last = int(np.searchsorted(part.offsets, end, side="right")) - 1
    last = min(max(last, first + 1), part.num_clients)
    yield first, last
    first = last


def partition_store(
  path: str | os.PathLike[str],
  data: FederatedDataset,
  *,
  name: str | None = None,
  num_clients: int | None = None,
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
  vocabulary: Sequence[str] | None = None,
  progress: Told | None = None,
  **options: Any,
) -> None:
  """Write the training examples of a data set with other clients or splits.

  The same options give the same clients as they do for a data set in memory.
  The memory holds a few numbers for each example, not the examples.

  Args:
    path: the new store's folder, which must not be there yet.
    data: the data set, such as `open_store` returns; central examples stay.
    name: of `PARTITIONERS`, by which the examples, all in one, are dealt to
      clients; None: the clients stay.
    num_clients: how many clients, with a partitioner.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: see `make_dataset`.
    seed: of all draws.
    vocabulary: see `StoreWriter`.
    progress: see `write_store`.
    **options: the partitioner's own.

  Raises:
    FileExistsError: there is something at `path`.
    TypeError, ValueError: an option is refused, or the data set has splits of
      clients already.
  """
  present = {"seen": data.seen, "unseen": data.unseen, **data.splits}
  for split, held in present.items():
    if held is not None:
      raise ValueError(
        f"The data set {data.name!r} has the split {split!r}, so its clients"
        " are split already; take a store without it."
      )
  train = data.train
  numbers = {"x": np.arange(train.num_examples)}
  if name is None:
    if num_clients is not None or options:
      given = sorted([*options, *(["num_clients"] if num_clients else [])])
      raise ValueError(
        f"{given[0]} is of a partitioner; name one, or leave it out."
      )
    index = FederatedData(
      examples=numbers, offsets=train.offsets, names=train.names
    )
  elif num_clients is None:
    raise ValueError(f"partition={name!r} needs num_clients; give it.")
  else:
    labels = train.examples.get("y", numbers["x"])
    client_of = partition(name, labels, num_clients, seed, **options)
    index = FederatedData.from_assignment(numbers, client_of, num_clients)
  rows = make_dataset(
    data.name,
    index,
    num_classes=0,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
  )
  write_store(path, data, rows=rows, vocabulary=vocabulary, progress=progress)
