"""Federated data in memory: examples, stored client after client.

`FederatedData` checks itself when it is made, so that nothing after it has
to.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedjax_sim.core import validate

Examples = Mapping[str, np.ndarray]  # field -> (examples, ...)
Names = Sequence[str]  # of clients


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FederatedData:
  """Clients and their examples.

  Attributes:
    examples: field -> (num_examples, ...), numeric or bool; client i owns the
      rows from `offsets[i]` to `offsets[i + 1]`.
    offsets: shape=(num_clients + 1,), int64; from 0 to num_examples.
    names: one a client, unique; None calls them by their index.
    allow_empty: let clients have no examples, as held-out sets need that stay
      aligned with a training set.

  Raises:
    TypeError: a field or `offsets` is not an array of such a dtype.
    ValueError: fields of different lengths, offsets that do not fit, a client
      without examples, a NaN or infinite value, names that do not fit.
  """

  examples: Examples
  offsets: np.ndarray
  names: Names | None = None
  allow_empty: bool = False

  def __post_init__(self) -> None:
    num_examples = validate.arrays("federated data", self.examples)
    _check_offsets(self.offsets, num_examples)
    _check_names(self.names, self.num_clients)
    if not self.allow_empty and not self.sizes.all():
      raise no_examples_error(
        named_client(int(np.argmin(self.sizes)), self.names)
      )
    for field, array in self.examples.items():
      check_finite(field, array, self._where)

  @classmethod
  def from_clients(
    cls,
    clients: Mapping[Any, Mapping[str, npt.ArrayLike]]
    | Iterable[Mapping[str, npt.ArrayLike]],
    drop_empty: bool = False,
  ) -> FederatedData:
    """Concatenate the clients' own arrays.

    Args:
      clients: one field -> (examples of this client, ...) a client, by name (a
        number is called by its digits) or in a sequence.
      drop_empty: leave out clients without examples.

    Raises:
      TypeError, ValueError: as the class, or clients that differ in fields,
        dtypes or shapes.
    """
    names = tuple(map(str, clients)) if isinstance(clients, Mapping) else None
    given = clients.values() if isinstance(clients, Mapping) else clients
    kept: list[tuple[int, int, dict[str, np.ndarray]]] = []
    for index, client in enumerate(given):
      who = named_client(index, names)
      arrays = {k: _as_array(who, k, v) for k, v in client.items()}
      size = validate.arrays(who, arrays)
      if size:
        if kept:
          validate.same_fields(
            who, arrays, named_client(kept[0][0], names), kept[0][2]
          )
        kept.append((index, size, arrays))
      elif not drop_empty:
        raise no_examples_error(who)
    if not kept:
      raise ValueError("There is no client with examples; give at least one.")
    return cls(
      examples={
        field: np.concatenate([arrays[field] for *_, arrays in kept])
        for field in kept[0][2]
      },
      offsets=offsets_of([size for _, size, _ in kept]),
      names=names and tuple(names[index] for index, *_ in kept),
    )

  @classmethod
  def from_assignment(
    cls,
    examples: Examples,
    client_of: npt.ArrayLike,
    num_clients: int | None = None,
    names: Sequence[str] | None = None,
    drop_empty: bool = False,
  ) -> FederatedData:
    """Sort examples by the client that owns each; stable inside a client.

    Args:
      examples: field -> (num_examples, ...).
      client_of: shape=(num_examples,), integer; the owner of each example.
      num_clients: how many there are; None counts the names, or takes the
        largest owner.
      names: one a client.
      drop_empty: leave out clients without examples.

    Raises:
      TypeError, ValueError: as the class, or a `client_of` that does not fit.
    """
    num_examples = validate.arrays("examples", examples)
    client_of = np.asarray(client_of)
    if client_of.dtype.kind not in "iu":
      raise TypeError(
        f"client_of has dtype {client_of.dtype}; give whole numbers."
      )
    if client_of.shape != (num_examples,):
      raise ValueError(
        f"client_of has shape {client_of.shape} for {num_examples} examples; "
        "give one owner an example."
      )
    client_of = client_of.astype(np.int64)  # bincount refuses uint64
    largest = int(client_of.max(initial=-1))
    if num_clients is None:
      num_clients = largest + 1 if names is None else len(names)
    num_clients = validate.integer("num_clients", num_clients)
    if largest >= num_clients or client_of.min(initial=0) < 0:
      wrong = largest if largest >= num_clients else int(client_of.min())
      raise ValueError(
        f"client_of holds {wrong}; give numbers from 0 to {num_clients - 1}."
      )
    order = np.argsort(client_of, kind="stable")
    sizes = np.bincount(client_of, minlength=num_clients)
    names = None if names is None else tuple(names)
    _check_names(names, num_clients)
    if drop_empty:
      names = names and tuple(itertools.compress(names, sizes))
      sizes = sizes[sizes > 0]
    return cls(
      examples={field: array[order] for field, array in examples.items()},
      offsets=offsets_of(sizes),
      names=names,
    )

  @property
  def num_clients(self) -> int:
    """The number of clients."""
    return len(self.offsets) - 1

  @property
  def num_examples(self) -> int:
    """The number of examples of all clients."""
    return int(self.offsets[-1])

  @property
  def sizes(self) -> np.ndarray:
    """The number of examples of each client, shape=(num_clients,), int64."""
    return np.diff(self.offsets)

  def client(self, i: int) -> dict[str, np.ndarray]:
    """Return client i's examples, field -> (examples of i, ...), as views."""
    i = validate.integer("client", i, ge=0, le=self.num_clients - 1)
    rows = slice(self.offsets[i], self.offsets[i + 1])
    return {field: array[rows] for field, array in self.examples.items()}

  def client_name(self, i: int) -> str:
    """Return client i's name, or 'client i' if clients have none."""
    i = validate.integer("client", i, ge=0, le=self.num_clients - 1)
    return f"client {i}" if self.names is None else self.names[i]

  def owner_of(self, rows: npt.ArrayLike) -> np.ndarray:
    """Return the client, shape=(n,), int64, that owns each of n rows."""
    return np.searchsorted(self.offsets, rows, side="right") - 1

  def select(self, ids: npt.ArrayLike) -> FederatedData:
    """Return these clients, in this order.

    Args:
      ids: the clients' indices, shape=(n,), integer; n >= 1, no duplicates.

    Raises:
      TypeError, ValueError: `ids` is not such an array.
    """
    ids = validate.cohort(ids, self.num_clients)
    sizes = self.sizes[ids]
    offsets = offsets_of(sizes)
    rows = np.arange(offsets[-1])
    rows += np.repeat(self.offsets[ids] - offsets[:-1], sizes)
    return FederatedData(
      examples={
        field: np.asarray(array)[rows] for field, array in self.examples.items()
      },
      offsets=offsets,
      names=self.names and tuple(self.names[i] for i in ids.tolist()),
      allow_empty=self.allow_empty,
    )

  def at_least(self, n: int) -> FederatedData:
    """Return the clients with n examples or more.

    Raises:
      ValueError: there is none.
    """
    n = validate.integer("data.min_examples", n, ge=0)
    kept = np.flatnonzero(self.sizes >= n)
    if not kept.size:
      raise ValueError(
        f"data.min_examples={n} leaves no client; the largest has "
        f"{self.sizes.max()} examples. Lower it."
      )
    return self if len(kept) == self.num_clients else self.select(kept)

  def pooled(self) -> FederatedData:
    """Return all examples as one client's; shares the arrays."""
    return FederatedData(
      examples=self.examples,
      offsets=offsets_of([self.num_examples]),
      allow_empty=self.allow_empty,
    )

  def label_range(self, field: str) -> tuple[int, int]:
    """Return the smallest and the largest number of a field of integers."""
    labels = self.examples[field]
    return int(labels.min()), int(labels.max())

  def _where(self, row: int) -> str:
    i = int(self.owner_of(row))
    return f"{named_client(i, self.names)}, example {row - self.offsets[i]}"


def check_finite(
  field: str, array: np.ndarray, where: Callable[[int], str]
) -> None:
  """Refuse NaN and infinity.

  Args:
    field: what messages call the array.
    array: shape=(examples, ...).
    where: row -> whose it is, for messages.

  Raises:
    ValueError: there is one; names field, client and example.
  """
  if array.dtype.kind != "f" or not array.size:
    return
  with np.errstate(invalid="ignore"):  # min and max carry any NaN along
    if np.isfinite([array.min(), array.max()]).all():
      return
  first = tuple(np.argwhere(~np.isfinite(array))[0])
  raise ValueError(
    f"field {field!r} of {where(int(first[0]))} holds "
    f"{array[first]}; remove the example or fill in a finite number."
  )


def offsets_of(sizes: npt.ArrayLike) -> np.ndarray:
  """Return `FederatedData.offsets` for sizes, shape=(num_clients,)."""
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def named_client(index: int, names: Names | None) -> str:
  """Return a client's number, and its name where it has one."""
  return f"client {index}" + (f" ({names[index]!r})" if names else "")


def no_examples_error(who: str) -> ValueError:
  """Return the error that a client has no examples."""
  return ValueError(
    f"{who} has no examples; leave such clients out with drop_empty=True in "
    "from_clients or from_assignment, or raise data.min_examples."
  )


def _as_array(who: str, field: str, value: npt.ArrayLike) -> np.ndarray:
  try:
    return np.asarray(value)
  except ValueError as error:
    raise ValueError(
      f"{who}: field {field!r} is no array ({error}); give its examples "
      "one shape."
    ) from error


def _check_offsets(offsets: np.ndarray, num_examples: int) -> None:
  if not isinstance(offsets, np.ndarray) or offsets.dtype != np.int64:
    kind = getattr(offsets, "dtype", type(offsets).__name__)
    raise TypeError(f"offsets is {kind}; give a numpy array of int64.")
  if offsets.ndim != 1 or len(offsets) < 2:
    raise ValueError(
      f"offsets has shape {offsets.shape}; give (num_clients + 1,) numbers, "
      "for at least one client."
    )
  if offsets[0] != 0 or offsets[-1] != num_examples:
    raise ValueError(
      f"offsets go from {offsets[0]} to {offsets[-1]}; let them start with "
      f"0 and end with the number of examples, {num_examples}."
    )
  falls = np.flatnonzero(offsets[1:] < offsets[:-1])
  if falls.size:
    i = int(falls[0])
    raise ValueError(
      f"offsets fall from {offsets[i]} to {offsets[i + 1]} at client {i}; "
      "let them never decrease."
    )


def _check_names(names: Names | None, num_clients: int) -> None:
  if names is None:
    return
  if len(names) != num_clients:
    raise ValueError(
      f"names has {len(names)} entries for {num_clients} clients; give one "
      "a client."
    )
  first: dict[str, int] = {}
  for i, name in enumerate(names):
    if not isinstance(name, str):
      raise TypeError(f"names holds {name!r} for client {i}; give strings.")
    if first.setdefault(name, i) != i:
      raise ValueError(
        f"names calls clients {first[name]} and {i} {name!r}; give each its "
        "own name."
      )
