"""Federated data in memory: examples, stored client after client.

`FederatedData` is one set of clients with their examples, `FederatedDataset`
the sets that a run needs: for training, for evaluation and for testing. Both
check themselves when they are made, so that nothing after them has to.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedjax_sim.core import validate

Examples = Mapping[str, np.ndarray]  # field -> (examples, ...)
Names = Sequence[str]  # of clients
_PIECE = 2**13  # rows that are read at once
Prepare = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # of a batch
# (key, examples of a batch as `prepare` leaves them) -> the same, changed
Augment = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]


def as_stored(examples: Mapping[str, Any]) -> Mapping[str, Any]:
  """The examples as they are."""
  return examples


def prepared(examples: Mapping[str, Any], x: Any) -> dict[str, Any]:
  """The examples with this `x`, and `y`, if there, as int32 if it is whole."""
  out = {**examples, "x": x}
  if "y" in out and out["y"].dtype.kind in "iu":
    out["y"] = out["y"].astype(np.int32)
  return out


def prepared_shapes(prepare: Prepare, examples: Examples) -> dict[str, Any]:
  """What `prepare` makes of one example, traced.

  Args:
    prepare: see `FederatedDataset`.
    examples: field -> (examples, ...), as they are stored.

  Returns:
    field -> `jax.ShapeDtypeStruct`, shape=(1, ...).

  Raises:
    ValueError: it cannot be traced.
  """
  import jax  # here, as data that are stored as they are do without

  one = {
    field: jax.ShapeDtypeStruct(
      (1, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
    )
    for field, x in examples.items()
  }
  try:
    return dict(jax.eval_shape(prepare, one))
  except Exception as error:
    text = " ".join(str(error).split())
    raise ValueError(
      f"prepare fails on a batch of one example: {type(error).__name__}: {text}"
    ) from error


def input_shape(prepare: Prepare, examples: Examples) -> tuple[int, ...]:
  """`FederatedDataset.example_shape`; () where there is no field "x"."""
  if "x" not in examples:
    return ()
  if prepare is as_stored:
    return examples["x"].shape[1:]
  x = prepared_shapes(prepare, examples).get("x")
  return () if x is None else tuple(x.shape[1:])


def from_bytes(examples: Mapping[str, Any]) -> dict[str, Any]:
  """`x`, bytes, as float32 from 0 to 1, and whole labels as int32."""
  return prepared(examples, examples["x"].astype(np.float32) / 255)


def normalize(
  examples: Mapping[str, Any], *, mean: np.ndarray, stddev: np.ndarray
) -> dict[str, Any]:
  """`x` becomes (x - mean) / stddev, in its dtype if that is a float's.

  Args:
    examples: with "x", (batch, ..., channels); whole numbers become float32.
    mean: shape=() or (channels,), float32.
    stddev: the same, > 0.
  """
  import jax.numpy as jnp

  given = examples["x"].dtype
  floats = jnp.issubdtype(given, jnp.floating)
  x = examples["x"].astype(
    jnp.promote_types(given, np.float32) if floats else np.float32
  )
  # As many dimensions as a batch has: JAX can be told to refuse others.
  of_batch = lambda a: a.astype(x.dtype).reshape(
    (1,) * (x.ndim - a.ndim) + a.shape
  )
  x = (x - of_batch(mean)) / of_batch(stddev)
  return {**examples, "x": x.astype(given) if floats else x}


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
      raise _no_examples(_who(int(np.argmin(self.sizes)), self.names))
    for field, array in self.examples.items():
      check_finite(field, array, self._where)

  @classmethod
  def from_clients(
    cls,
    clients: Mapping[Any, Mapping[str, npt.ArrayLike]]
    | Iterable[Mapping[str, npt.ArrayLike]],
    drop_empty: bool = False,
  ) -> FederatedData:
    """Joins the clients' own arrays.

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
      who = _who(index, names)
      arrays = {k: _as_array(who, k, v) for k, v in client.items()}
      size = validate.arrays(who, arrays)
      if size:
        if kept:
          validate.alike(who, arrays, _who(kept[0][0], names), kept[0][2])
        kept.append((index, size, arrays))
      elif not drop_empty:
        raise _no_examples(who)
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
    """Sorts examples by the client that owns each; stable inside a client.

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
    num_clients = validate.whole("num_clients", num_clients)
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
    """How many clients there are."""
    return len(self.offsets) - 1

  @property
  def num_examples(self) -> int:
    """How many examples all clients have."""
    return int(self.offsets[-1])

  @property
  def sizes(self) -> np.ndarray:
    """Examples of each client, shape=(num_clients,), int64."""
    return np.diff(self.offsets)

  def client(self, i: int) -> dict[str, np.ndarray]:
    """Client i's examples, field -> (examples of i, ...), as views."""
    i = validate.whole("client", i, least=0, most=self.num_clients - 1)
    rows = slice(self.offsets[i], self.offsets[i + 1])
    return {field: array[rows] for field, array in self.examples.items()}

  def client_name(self, i: int) -> str:
    """Client i's name, or 'client i' if clients have none."""
    i = validate.whole("client", i, least=0, most=self.num_clients - 1)
    return f"client {i}" if self.names is None else self.names[i]

  def owner_of(self, rows: npt.ArrayLike) -> np.ndarray:
    """The clients, shape=(n,), int64, that own rows, shape=(n,), integer."""
    return np.searchsorted(self.offsets, rows, side="right") - 1

  def select(self, ids: npt.ArrayLike) -> FederatedData:
    """These clients, in this order.

    Args:
      ids: shape=(n,), integer; n >= 1, no duplicates.

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
    """The clients with n examples or more.

    Raises:
      ValueError: there is none.
    """
    n = validate.whole("data.min_examples", n, least=0)
    kept = np.flatnonzero(self.sizes >= n)
    if not kept.size:
      raise ValueError(
        f"data.min_examples={n} leaves no client; the largest has "
        f"{self.sizes.max()} examples. Lower it."
      )
    return self if len(kept) == self.num_clients else self.select(kept)

  def pooled(self) -> FederatedData:
    """All examples as one client's; shares the arrays."""
    return FederatedData(
      examples=self.examples,
      offsets=offsets_of([self.num_examples]),
      allow_empty=self.allow_empty,
    )

  def label_range(self, field: str) -> tuple[int, int]:
    """The least and the largest of a field of whole numbers, with examples."""
    labels = self.examples[field]
    return int(labels.min()), int(labels.max())

  def _where(self, row: int) -> str:
    i = int(self.owner_of(row))
    return f"{_who(i, self.names)}, example {row - self.offsets[i]}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredData(FederatedData):
  """Clients whose examples were checked when they were written to the disk.

  Nothing is read when it is made: the arrays are memory-mapped.

  Attributes:
    digest: SHA-256 of the checksums of all that there is, hexadecimal.
    bounds: field -> its least and largest number, of whole numbers, one an
      example.
  """

  digest: str
  bounds: Mapping[str, tuple[int, int]]

  def __post_init__(self) -> None:
    num_examples = validate.arrays("a store", self.examples)
    if self.offsets[0] != 0 or self.offsets[-1] != num_examples:
      raise ValueError(
        f"A store has {num_examples} examples, and offsets to"
        f" {self.offsets[-1]}; write it again."
      )

  def label_range(self, field: str) -> tuple[int, int]:
    """As recorded."""
    return self.bounds.get(field) or super().label_range(field)

  @functools.cached_property
  def in_memory(self) -> FederatedData:
    """A copy in the host's memory, made once."""
    examples = {k: np.array(values) for k, values in self.examples.items()}
    for values in self.examples.values():
      forget(values)
    return dataclasses.replace(self, examples=examples)


def forget(values: np.ndarray) -> None:
  """Lets a memory-mapped array's pages go; the disk has them."""
  mapped = getattr(values, "_mmap", None)
  if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
    mapped.madvise(mmap.MADV_DONTNEED)


def take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """These rows; of an array on the disk without keeping its pages in memory.

  The system maps many pages around each that is read, hence piece by piece.
  """
  if not isinstance(array, np.memmap):
    return array[rows]
  out = np.empty((len(rows), *array.shape[1:]), array.dtype)
  plain = np.asarray(array)
  for first in range(0, len(rows), _PIECE):
    piece = slice(first, first + _PIECE)
    out[piece] = plain[rows[piece]]
    forget(array)
  return out


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FederatedDataset:
  """The data of a run; all parts have train's fields, dtypes and shapes.

  Attributes:
    name: what reports call it.
    train: the clients that train.
    num_classes: of the labels "y" that the model gets; 0 if they are no
      classes.
    example_shape: shape of one "x" that the model gets.
    seen: held-out examples of the training clients; client i is train's.
    unseen: clients that never train.
    test: central test examples, field -> (examples, ...).
    server: examples that the server has itself, field -> (examples, ...), as
      some algorithms need.
    splits: further sets that an algorithm's pass may walk over, such as
      "labelled"; client i is train's.
    prepare: examples of one batch, field -> (batch, ...), -> what the model
      gets; on the device, in every step, so that images can be stored as the
      small integers that they are. Whoever calls the model outside of a run
      calls it, too, as `prediction.predict` does; labels may be missing then.
      Pure, traced, row by row; a module's own function, not a lambda, where the
      data set is to be pickled.
    augment: (key, what `prepare` gives) -> the same fields, shapes and dtypes;
      on the device, in local steps alone, with another key in each. Pure,
      traced. None: nothing. See `preprocess.py` for both.
    tables: field -> shape=(n,), int32; where `prepare` replaces the field's
      numbers by entries of a table. Labels "y" are then numbers of entries, and
      the classes are what the table gives.

  Raises:
    TypeError, ValueError: a part does not fit to train, or a label is outside
      0..num_classes - 1, or outside its table.
  """

  name: str
  train: FederatedData
  num_classes: int
  example_shape: tuple[int, ...]
  seen: FederatedData | None = None
  unseen: FederatedData | None = None
  test: Examples | None = None
  server: Examples | None = None
  splits: Mapping[str, FederatedData] = dataclasses.field(default_factory=dict)
  prepare: Prepare = as_stored
  augment: Augment | None = None
  tables: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    validate.whole("num_classes", self.num_classes, least=0)
    train = self.train
    if "x" in train.examples:
      shape = input_shape(self.prepare, train.examples)
      if shape != self.example_shape:
        raise ValueError(
          f"example_shape={self.example_shape} but one 'x' of train has "
          f"shape {shape}; give that."
        )
    if "train" in self.splits:
      raise ValueError("splits holds 'train'; give that set as train=.")
    aligned = {f"splits[{name!r}]": data for name, data in self.splits.items()}
    if self.seen is not None:
      aligned["seen"] = self.seen
    for part, data in aligned.items():
      if data.num_clients != train.num_clients or data.names != train.names:
        raise ValueError(
          f"{part} has {data.num_clients} clients, train "
          f"{train.num_clients}; give the same clients, names and order."
        )
    if not isinstance(train, StoredData) and not train.sizes.all():
      raise _no_examples(_who(int(np.argmin(train.sizes)), train.names))
    if self.seen is not None and not self.seen.num_examples:
      raise ValueError("seen has no examples; give None instead.")
    for part, data in self.parts.items():
      validate.alike(part, data.examples, "train", train.examples)
      labels = data.examples.get("y")
      if self.stored_classes and labels is not None:
        check_labels(data, "y", self.stored_classes, part)

  @property
  def stored_classes(self) -> int:
    """Above all labels "y" as they are stored; 0 if they are no classes."""
    return len(self.tables["y"]) if "y" in self.tables else self.num_classes

  @property
  def parts(self) -> dict[str, FederatedData]:
    """Every set that there is; central ones as one client's."""
    splits = {f"splits[{name!r}]": data for name, data in self.splits.items()}
    parts = {"train": self.train, **splits}
    parts |= {
      name: data
      for name, data in (("seen", self.seen), ("unseen", self.unseen))
      if data is not None
    }
    for part, examples in (("test", self.test), ("server", self.server)):
      if examples is not None:
        offsets = offsets_of([validate.arrays(part, examples)])
        parts[part] = FederatedData(examples=examples, offsets=offsets)
    return parts

  @property
  def all_splits(self) -> dict[str, FederatedData]:
    """Every set that a pass may walk over, by the name of its split."""
    return {"train": self.train, **self.splits}


def check_labels(
  data: FederatedData, field: str, num_classes: int, part: str = "data"
) -> None:
  """Refuses labels outside 0..num_classes - 1.

  Args:
    data: has `field`, (num_examples, ...), integer.
    field: the labels' field.
    num_classes: at least 1.
    part: what messages call `data`.

  Raises:
    TypeError: the labels are no integers.
    ValueError: a label is outside; names its client.
  """
  field = validate.known("field", field, data.examples)
  labels = data.examples[field]
  if labels.dtype.kind not in "iu":
    raise TypeError(
      f"{part}: field {field!r} is {labels.dtype}; give integer labels, or"
      f" num_classes=0 instead of {num_classes} if they are no classes."
    )
  if not labels.size:
    return
  least, most = data.label_range(field)
  if least >= 0 and most < num_classes:
    return
  outside = np.argwhere((labels < 0) | (labels >= num_classes))
  if outside.size:  # a store's bounds may be of a damaged file
    first = tuple(outside[0])
    above = ", or raise num_classes" if labels[first] >= num_classes else ""
    raise ValueError(
      f"{part}: field {field!r} of {data._where(int(first[0]))} holds label "
      f"{labels[first]}; give labels from 0 to {num_classes - 1}{above}."
    )


def check_finite(
  field: str, array: np.ndarray, where: Callable[[int], str]
) -> None:
  """Refuses NaN and infinity.

  Args:
    field: what messages call the array.
    array: (examples, ...).
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
  """`FederatedData.offsets`, int64, of sizes, shape=(num_clients,)."""
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _who(index: int, names: Names | None) -> str:
  return f"client {index}" + (f" ({names[index]!r})" if names else "")


def _no_examples(who: str) -> ValueError:
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
