"""Splits of federated data: inside each client, and by whole clients."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.batch_steps import Prepare, as_stored, input_shape
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import Examples, FederatedData, offsets_of
from fedjax_sim.data.seeding import MOST_SEED, Stream, generator

Clients = int | float | str | Sequence[str]  # how many, what share, or which


def split_clients(
  data: FederatedData,
  fraction: float,
  seed: int,
  stream: Stream = Stream.HELD_OUT,
) -> tuple[FederatedData, FederatedData]:
  """Hold out examples of every client, who keeps at least one.

  Args:
    data: the clients.
    fraction: how much of each client's examples to hold out, rounded; > 0.
    seed: chooses the examples.
    stream: of randomness.

  Returns:
    (train, held_out), both with data's clients; held_out may leave some empty.

  Raises:
    TypeError, ValueError: no such fraction, or it holds out nothing.
  """
  fraction = validate.number("data.heldout_fraction", fraction, gt=0, le=1)
  sizes = data.sizes
  counts = np.rint(fraction * sizes).astype(np.int64)
  counts = np.clip(counts, 0, np.maximum(sizes - 1, 0))
  if not counts.any():
    raise ValueError(
      f"data.heldout_fraction={fraction} holds out nothing; the largest "
      f"client has {sizes.max()} examples. Raise it, or set it to 0."
    )
  held, train = _divide(data, counts, seed, stream)
  return (
    dataclasses.replace(train, allow_empty=data.allow_empty),
    dataclasses.replace(held, allow_empty=True),
  )


def _divide(
  data: FederatedData, counts: np.ndarray, seed: int, stream: Stream
) -> tuple[FederatedData, FederatedData]:
  """Split every client's examples in a random choice and the others.

  Args:
    data: the clients.
    counts: shape=(num_clients,); how many of each client's to choose.
    seed: chooses them.
    stream: of randomness.
  """
  owner = np.repeat(np.arange(data.num_clients), data.sizes)
  draws = generator(seed, stream).random(data.num_examples)
  rank = np.arange(data.num_examples) - data.offsets[owner]
  chosen = np.empty(data.num_examples, bool)
  chosen[np.lexsort((draws, owner))] = rank < counts[owner]

  def part(mask: np.ndarray, sizes: np.ndarray) -> FederatedData:
    examples = {field: array[mask] for field, array in data.examples.items()}
    return FederatedData(
      examples=examples,
      offsets=offsets_of(sizes),
      names=data.names,
      allow_empty=True,
    )

  return part(chosen, counts), part(~chosen, data.sizes - counts)


def split_off_clients(
  data: FederatedData,
  amount: Clients,
  seed: int,
  stream: Stream = Stream.UNSEEN,
) -> tuple[FederatedData, FederatedData]:
  """Split the clients in those that stay and those that are moved away.

  Args:
    data: the clients.
    amount: how many, or below 1 what fraction, rounded, but at least one
      client; or a client's name, or those of several.
    seed: chooses the clients, unless they are named.
    stream: of randomness; it also says which field messages name.

  Returns:
    (those left, those moved away), both in data's order.

  Raises:
    TypeError, ValueError: no such amount or name, or no client would be left.
  """
  field, total = f"data.{stream.name.lower()}_clients", data.num_clients
  if total < 2:
    raise ValueError(f"{field}={amount} needs 2 clients or more; set it to 0.")
  if isinstance(amount, Sequence):
    chosen: Any = _named(field, data, amount)
  else:
    if 0 < validate.number(field, amount, gt=0) < 1:
      amount = max(1, round(amount * total))
    if isinstance(amount, float) and amount.is_integer():
      amount = int(amount)
    count = validate.integer(field, amount, le=total - 1)
    chosen = generator(seed, stream).permutation(total)[:count]
  moved = np.zeros(total, bool)
  moved[chosen] = True
  return data.select(np.flatnonzero(~moved)), data.select(np.flatnonzero(moved))


def _named(
  field: str, data: FederatedData, names: str | Sequence[str]
) -> list[int]:
  """Return the indices of the clients with these names.

  Raises:
    TypeError, ValueError: there is none of a name, or all are named.
  """
  for name in [names] if isinstance(names, str) else names:
    validate.instance(field, name, str, "0.2, 3 or ('ann', 'bob')")
  found = client_numbers(field, data, names)
  if len({*found}) == data.num_clients:
    raise ValueError(
      f"{field}={names!r} names all clients, and none is left to train; leave"
      " one out."
    )
  return found


def client_numbers(
  field: str, data: FederatedData, given: str | Sequence[int | str]
) -> list[int]:
  """Return the numbers of clients, which are given by number or by name.

  Args:
    field: what messages call it.
    data: the clients.
    given: whole numbers from 0 on, and names; or one name.

  Raises:
    TypeError, ValueError: there is no such client; names the nearest name.

  Example:
    client_numbers("server.leave_out", data, (0, "ann"))
  """
  clients = [given] if isinstance(given, str) else list(given)
  numbers: dict[str, int] = {}
  if any(isinstance(client, str) for client in clients):
    numbers = {data.client_name(i): i for i in range(data.num_clients)}
  found = []
  for client in clients:
    if isinstance(client, str):
      if client not in numbers:
        raise ValueError(_unknown(field, given, client, numbers))
      found.append(numbers[client])
      continue
    last = data.num_clients - 1
    number = validate.integer(field, client, ge=0)
    if number > last:
      named = data.names is not None and str(number) in data.names
      hint = f"; the client of that name is {str(number)!r}" if named else ""
      raise ValueError(
        f"{field}={number}: there is no client {number}; clients have the"
        f" numbers 0 to {last}{hint}."
      )
    found.append(number)
  return found


def _unknown(
  field: str,
  given: str | Sequence[int | str],
  name: str,
  numbers: Mapping[str, int],
) -> str:
  """Return what is wrong with a name that no client has."""
  near = difflib.get_close_matches(name, numbers, n=1, cutoff=0.5)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  few = ", ".join(map(repr, itertools.islice(numbers, 10)))
  more = ", ..." if len(numbers) > 10 else ""
  return (
    f"{field}={given!r}: there is no client {name!r}.{hint} There are"
    f" {few}{more}."
  )


def with_server_data(
  dataset: FederatedDataset, amount: Clients, seed: int = 0
) -> FederatedDataset:
  """Give the examples of some training clients to the server.

  Their held-out examples are dropped.

  Args:
    dataset: the data set, some of whose clients no longer train.
    amount: how many clients, or which; see `split_off_clients`.
    seed: chooses them.

  Raises:
    TypeError, ValueError: no such amount, or further splits.
  """
  if dataset.splits:
    raise ValueError(
      f"data.server_clients={amount} does not go with further splits, whose"
      " clients are the training clients; make them afterwards."
    )
  train, moved = split_off_clients(dataset.train, amount, seed, Stream.SERVER)
  seen = dataset.seen
  if seen is not None:  # of the same clients, so that the same ones stay
    seen, _ = split_off_clients(seen, amount, seed, Stream.SERVER)
  return dataclasses.replace(
    dataset, train=train, seen=seen, server=moved.examples
  )


def with_random_labels(
  dataset: FederatedDataset, fraction: float, seed: int = 0
) -> tuple[FederatedDataset, np.ndarray]:
  """Replace all training labels of some clients by random ones.

  Args:
    dataset: a data set with classes.
    fraction: of the training clients, rounded; from 0 to 1.
    seed: chooses the clients and the labels.

  Returns:
    The data set, and the indices of those clients, increasing, int64.

  Raises:
    TypeError, ValueError: no such fraction, no classes, or several labels an
      example.
  """
  field = "data.random_label_clients"
  fraction = validate.number(field, fraction, ge=0, le=1)
  if not dataset.stored_classes:
    raise ValueError(
      f"{field}={fraction}: the labels of {dataset.name} are no classes; leave"
      " it out."
    )
  if dataset.train.examples["y"].ndim > 1:
    raise ValueError(
      f"{field}={fraction}: an example of {dataset.name} has several labels, of"
      " which some may be padding; leave it out."
    )
  train, rng = dataset.train, generator(seed, Stream.LABELS)
  count = round(fraction * train.num_clients)
  chosen = np.sort(rng.permutation(train.num_clients)[:count])
  hit = np.isin(np.repeat(np.arange(train.num_clients), train.sizes), chosen)
  labels = train.examples["y"].copy()
  drawn = rng.integers(0, dataset.stored_classes, hit.sum())
  labels[hit] = drawn.astype(labels.dtype)
  train = FederatedData(
    examples={**train.examples, "y": labels},
    offsets=train.offsets,
    names=train.names,
  )
  return dataclasses.replace(dataset, train=train), chosen


def with_few_labels(
  dataset: FederatedDataset, fraction: float, seed: int = 0
) -> FederatedDataset:
  """Split every training client's examples in labeled and unlabeled ones.

  The two become the splits "labelled" and "unlabelled"; `train` stays. Both
  keep the field "y", which a pass over "unlabelled" must not look at. Changes
  of `train` come before this one.

  Args:
    dataset: the data set, most of whose labels are to be hidden.
    fraction: of each client's examples that is labeled, rounded, but at least
      one; > 0. A client may be left without unlabeled ones.
    seed: chooses the examples.

  Raises:
    TypeError, ValueError: no such fraction, it leaves nothing unlabeled, or
      there are such splits already.
  """
  field = "data.labelled_fraction"
  fraction = validate.number(field, fraction, gt=0, le=1)
  for name in ("labelled", "unlabelled"):
    if name in dataset.splits:
      raise ValueError(
        f"{field}={fraction}: {dataset.name} has a split {name!r} already;"
        " leave the field out."
      )
  sizes = dataset.train.sizes
  counts = np.maximum(np.rint(fraction * sizes).astype(np.int64), 1)
  if (counts == sizes).all():
    raise ValueError(
      f"{field}={fraction} leaves nothing unlabelled; the largest client has"
      f" {sizes.max()} examples. Lower it, or leave it out."
    )
  labelled, rest = _divide(dataset.train, counts, seed, Stream.FEW_LABELS)
  splits = {**dataset.splits, "labelled": labelled, "unlabelled": rest}
  return dataclasses.replace(dataset, splits=splits)


def make_dataset(
  name: str,
  data: FederatedData,
  *,
  num_classes: int,
  test: Examples | None = None,
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
  prepare: Prepare = as_stored,
) -> FederatedDataset:
  """Make the data set of a run from all clients; every loader ends here.

  Args:
    name: what reports call it.
    data: all clients, with a field "x".
    num_classes: of the labels "y"; 0 if they are no classes.
    test: central test examples.
    heldout_fraction: see `split_clients`; 0 holds out nothing.
    unseen_clients: see `split_off_clients`; 0 moves none away.
    min_examples: clients with fewer are left out, before any split.
    seed: of both splits.
    prepare: what is done to a batch on the device; see `FederatedDataset`.

  Raises:
    TypeError, ValueError: an option is out of range, or the data is refused.
  """
  validate.instance("data", data, FederatedData, "FederatedData.from_clients")
  if "x" not in data.examples:
    raise ValueError(
      f"{name}: the examples have fields {sorted(data.examples)}; call the"
      " model's input 'x'."
    )
  validate.integer("data.seed", seed, ge=0, le=MOST_SEED)
  validate.number("data.heldout_fraction", heldout_fraction, ge=0, le=1)
  if not isinstance(unseen_clients, Sequence):
    validate.number("data.unseen_clients", unseen_clients, ge=0)
  train = data.at_least(min_examples)
  unseen = seen = None
  if unseen_clients:
    train, unseen = split_off_clients(train, unseen_clients, seed)
  if heldout_fraction:
    train, seen = split_clients(train, heldout_fraction, seed)
  return FederatedDataset(
    name=name,
    train=train,
    num_classes=num_classes,
    example_shape=input_shape(prepare, train.examples),
    seen=seen,
    unseen=unseen,
    test=test,
    prepare=prepare,
  )
