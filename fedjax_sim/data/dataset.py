"""Federated data sets: training clients and held-out examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.batch_steps import Augment, Prepare, as_stored, input_shape
from fedjax_sim.data.federated import (
  Examples,
  FederatedData,
  named_client,
  no_examples_error,
  offsets_of,
)
from fedjax_sim.data.stored import StoredData


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
    validate.integer("num_classes", self.num_classes, ge=0)
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
      raise no_examples_error(
        named_client(int(np.argmin(train.sizes)), train.names)
      )
    if self.seen is not None and not self.seen.num_examples:
      raise ValueError("seen has no examples; give None instead.")
    for part, data in self.parts.items():
      validate.same_fields(part, data.examples, "train", train.examples)
      labels = data.examples.get("y")
      if self.stored_classes and labels is not None:
        check_labels(data, "y", self.stored_classes, part)

  @property
  def stored_classes(self) -> int:
    """The bound below which stored labels "y" lie; 0 if they are no classes."""
    return len(self.tables["y"]) if "y" in self.tables else self.num_classes

  @property
  def parts(self) -> dict[str, FederatedData]:
    """Every part that is not None, by name; a central set is one client's."""
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
    """Every set that an algorithm's pass may walk over, by its split's name."""
    return {"train": self.train, **self.splits}


def check_labels(
  data: FederatedData, field: str, num_classes: int, part: str = "data"
) -> None:
  """Refuse labels outside 0..num_classes - 1.

  Args:
    data: clients with `field`, shape=(num_examples, ...), integer.
    field: the labels' field.
    num_classes: at least 1.
    part: what messages call `data`.

  Raises:
    TypeError: the labels are no integers.
    ValueError: a label is outside; names its client.
  """
  field = validate.one_of("field", field, data.examples)
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
