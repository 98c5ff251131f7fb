"""Partitioners: which client owns which example of a central data set.

All are pure functions that return `client_of`, shape=(num_examples,), int64,
and give every client at least `min_examples`; they raise `TypeError` or
`ValueError` with the name of the config's field if that cannot be.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedjax_sim.core import references, validate
from fedjax_sim.data.federated import Examples, FederatedData
from fedjax_sim.data.seeding import Stream, generator


def iid(
  num_examples: int, num_clients: int, *, seed: int, min_examples: int = 1
) -> np.ndarray:
  """Deal the shuffled examples in turn; sizes differ by at most 1.

  Args:
    num_examples: how many to deal.
    num_clients: to how many.
    seed: shuffles.
    min_examples: of each client.
  """
  _check_room(num_examples, num_clients, min_examples)
  turns = np.arange(num_examples) % num_clients
  return generator(seed, Stream.PARTITION).permutation(turns)


def dirichlet(
  labels: npt.ArrayLike,
  num_clients: int,
  *,
  seed: int,
  alpha: float = 0.5,
  min_examples: int = 1,
) -> np.ndarray:
  """Skew labels as Hsu et al. (2019, arXiv 1909.06335), with equal sizes.

  Client i draws its mix of classes q_i ~ Dirichlet(alpha * p), p being the
  classes' shares in the data, and its examples, without replacement, by q_i.
  Where clients want more of a class than there is, chance decides who gets it,
  and the others draw again by q_i among the classes that are left, so no client
  is served last. Each turn of that uses up a class or ends. Sizes differ by at
  most 1, so that `min_examples` needs no repair.

  Args:
    labels: shape=(num_examples,), integer.
    num_clients: how many clients.
    seed: of all draws.
    alpha: > 0; small is skewed, large is i.i.d. It is the sum of the classes'
      concentrations; where others give one per class, multiply by the classes.
    min_examples: of each client.
  """
  classes, left = _classes(labels)
  alpha = validate.number("data.alpha", alpha, gt=0)
  _check_room(len(classes), num_clients, min_examples)
  rng = generator(seed, Stream.PARTITION)
  mix = rng.dirichlet(alpha * left / len(classes), num_clients)
  counts = np.zeros((num_clients, len(left)), np.int64)
  missing = np.bincount(np.arange(len(classes)) % num_clients)
  while missing.any():
    wish = mix * (left > 0)
    lost = wish.sum(axis=1) == 0  # its classes are used up: take what is left
    wish[lost] = left
    wish /= wish.sum(axis=1, keepdims=True)
    wanted = rng.multinomial(missing, wish)
    for k in np.flatnonzero(wanted.sum(axis=0) > left):
      wanted[:, k] = rng.multivariate_hypergeometric(wanted[:, k], left[k])
    counts += wanted
    left -= wanted.sum(axis=0)
    missing -= wanted.sum(axis=1)
  order = np.lexsort((rng.random(len(classes)), classes))
  owners = np.tile(np.arange(num_clients), len(left))
  client_of = np.empty(len(classes), np.int64)
  client_of[order] = np.repeat(owners, counts.T.ravel())
  return client_of


def shards(
  labels: npt.ArrayLike,
  num_clients: int,
  *,
  seed: int,
  shards_per_client: int = 2,
  min_examples: int = 1,
) -> np.ndarray:
  """Give clients few classes, as McMahan et al. (2017, arXiv 1602.05629).

  Examples, sorted by label, are cut into shards whose sizes differ by at most
  1; chance deals `shards_per_client` to each client.

  Args:
    labels: shape=(num_examples,), integer.
    num_clients: how many clients.
    seed: deals the shards.
    shards_per_client: how many a client gets.
    min_examples: of each client.
  """
  classes, _ = _classes(labels)
  _check_room(len(classes), num_clients, min_examples)
  each = validate.integer("data.shards_per_client", shards_per_client)
  total = num_clients * each
  if len(classes) // total * each < min_examples:
    raise ValueError(
      f"data.shards_per_client={each} cuts {len(classes)} examples into "
      f"{total} shards, too small for data.min_examples={min_examples}; "
      "lower it or data.num_clients."
    )
  owners = generator(seed, Stream.PARTITION).permutation(total) % num_clients
  client_of = np.empty(len(classes), np.int64)
  order = np.argsort(classes, kind="stable")
  client_of[order] = owners[np.arange(len(classes)) * total // len(classes)]
  return client_of


def power_law(
  num_examples: int,
  num_clients: int,
  *,
  seed: int,
  exponent: float = 2.5,
  min_examples: int = 1,
) -> np.ndarray:
  """Give clients i.i.d. examples, in numbers that follow a power law.

  Every client has `min_examples`; the rest is shared in proportion to weights
  w >= 1 from the Pareto density w**-exponent.

  Args:
    num_examples: how many to deal.
    num_clients: to how many.
    seed: of sizes and examples.
    exponent: > 1; small is skewed.
    min_examples: of each client.
  """
  exponent = validate.number("data.exponent", exponent, gt=1)
  _check_room(num_examples, num_clients, min_examples)
  rng = generator(seed, Stream.PARTITION)
  # Logarithms, as weights overflow when the exponent is close to 1.
  logs = rng.exponential(1 / (exponent - 1), num_clients)
  shares = np.cumsum(np.exp(logs - logs.max()))
  rest = num_examples - num_clients * min_examples
  ends = np.rint(rest * (shares / shares[-1])).astype(np.int64)
  sizes = min_examples + np.diff(ends, prepend=0)
  return rng.permutation(np.repeat(np.arange(num_clients), sizes))


def stored_order(
  num_examples: int, num_clients: int, *, seed: int, min_examples: int = 1
) -> np.ndarray:
  """Cut the examples in the order in which they are stored; none is drawn.

  Sizes differ by at most 1.

  Args:
    num_examples: how many to cut.
    num_clients: into how many.
    seed: not used, as nothing is drawn.
    min_examples: of each client.
  """
  del seed
  _check_room(num_examples, num_clients, min_examples)
  return np.arange(num_examples) * num_clients // num_examples


def by_key(keys: npt.ArrayLike) -> tuple[np.ndarray, tuple[str, ...]]:
  """Make one client for each distinct key, sorted by key.

  Args:
    keys: shape=(num_examples,), integers or strings, such as the user's name.

  Returns:
    `client_of` and the clients' names.
  """
  keys = np.asarray(keys)
  if keys.ndim != 1 or keys.dtype.kind not in "iuSU":
    raise TypeError(
      f"Client keys have dtype {keys.dtype} and shape {keys.shape}; give a "
      "one-dimensional array of integers or strings."
    )
  if keys.dtype.kind == "S":
    keys = np.strings.decode(keys, "utf-8")
  distinct, client_of = np.unique(keys, return_inverse=True)
  return client_of.astype(np.int64), tuple(map(str, distinct.tolist()))


PARTITIONERS: Mapping[str, Callable[..., np.ndarray]] = {
  "iid": iid,
  "dirichlet": dirichlet,
  "shards": shards,
  "power_law": power_law,
  "stored_order": stored_order,
}


def partition(
  name: str,
  labels: npt.ArrayLike,
  num_clients: int,
  seed: int,
  **options: Any,
) -> np.ndarray:
  """Return `client_of` by the partitioner of this name.

  Args:
    name: of `PARTITIONERS`, or a reference to the user's own.
    labels: shape=(num_examples,), integer.
    num_clients: how many clients.
    seed: of all draws.
    **options: the partitioner's own keywords.

  Raises:
    UnknownNameError: no such partitioner, or it has no such option.
    TypeError, ValueError: it refuses a value.
  """
  field = "data.partition"
  function = references.lookup(field, name, PARTITIONERS, np.ndarray)
  first = next(iter(inspect.signature(function).parameters), "")
  subject = labels if first == "labels" else len(np.asarray(labels))
  given = {"num_clients": num_clients, "seed": seed, **options}
  validate.arguments(f"{field}={name!r}", {first: subject, **given}, function)
  return function(subject, **given)


def deal(
  examples: Examples, name: str, num_clients: int, seed: int, **options: Any
) -> FederatedData:
  """Deal a central set's examples to clients by their labels "y".

  Args:
    examples: field -> (num_examples, ...).
    name: of `PARTITIONERS`; the rest is as in `partition`.
    num_clients: how many clients.
    seed: of all draws.
    **options: the partitioner's own keywords.
  """
  client_of = partition(name, examples["y"], num_clients, seed, **options)
  return FederatedData.from_assignment(examples, client_of, num_clients)


def _classes(labels: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Return labels as 0..classes - 1, and the number of examples of each."""
  labels = np.asarray(labels)
  if labels.ndim != 1 or labels.dtype.kind not in "iu":
    raise TypeError(
      f"labels have dtype {labels.dtype} and shape {labels.shape}; give one "
      "integer an example, or data.partition='iid' or 'power_law'."
    )
  _, classes, counts = np.unique(
    labels, return_inverse=True, return_counts=True
  )
  return classes, counts


def _check_room(num_examples: int, num_clients: int, min_examples: int) -> None:
  num_clients = validate.integer("data.num_clients", num_clients)
  min_examples = validate.integer("data.min_examples", min_examples)
  if num_clients * min_examples > num_examples:
    raise ValueError(
      f"data.num_clients={num_clients} with data.min_examples="
      f"{min_examples} needs {num_clients * min_examples} examples, but "
      f"there are {num_examples}; lower one of them."
    )
