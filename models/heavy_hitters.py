"""The most frequent values of a field, as a model.

A value is a whole number: a label, an item, a token. The algorithm
`heavy_hitters` finds the values; nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  Task,
  Variables,
  validate,
)

FIELDS = ("x", "y")
# Up to which float32, as parameters are, holds whole numbers.
MOST_VALUES = 2**24


def heavy_hitters(
  example_shape: tuple[int, ...],
  num_classes: int,
  hitters: int = 10,
  field: str = "y",
  domain: int | None = None,
  ignored: int | None = None,
) -> Task:
  """Return places for the most frequent values, all empty at first.

  `Variables.params` are float32: `values`, shape=(hitters,), whole numbers, -1
  where empty, most frequent first, and `shares`, shape=(hitters,), what part of
  the clients' values each is. `Variables.frozen` is `domain`. The loss of an
  example is the fraction of its values that are not among these. What
  `Task.features` returns are the values, shape=(batch, ...), int32, -1 where
  ignored.

  Args:
    example_shape: shape of one input.
    num_classes: the domain, unless given.
    hitters: how many values there is a place for.
    field: `y`, the label, or `x`: each number of an input is a value.
    domain: values are below, and >= 0; at most 2^24. None: the number of
      classes.
    ignored: a value that does not count, such as a padding token.

  Raises:
    TypeError, ValueError: names the field.

  Example:
    >>> task = heavy_hitters((5,), 0, hitters=3, field="x", domain=1000)
    >>> task.init(jax.random.key(0)).params["values"].tolist()
    [-1.0, -1.0, -1.0]
  """
  del example_shape
  count = validate.integer("hitters", hitters, le=2**16)
  validate.one_of("field", field, FIELDS)
  name = "num_classes" if domain is None else "domain"
  size = num_classes if domain is None else domain
  size = validate.integer(name, size, ge=1, le=MOST_VALUES)
  if ignored is not None:
    ignored = validate.integer("ignored", ignored, ge=0, le=size - 1)

  def init(key: Key) -> Variables:
    del key
    params = {
      "values": jnp.full((count,), -1, jnp.float32),
      "shares": jnp.zeros((count,), jnp.float32),
    }
    return Variables(params, frozen={"domain": jnp.int32(size)})

  def values(variables: Variables, examples: Examples) -> Array:
    del variables
    found = examples[field]
    # A check of stored examples refuses what is no whole number.
    found = found.reshape(found.shape[0], -1).astype(jnp.int32)
    return found if ignored is None else jnp.where(found == ignored, -1, found)

  def missed(variables: Variables, examples: Examples) -> Loss:
    there = values(variables, examples)
    known = jnp.isin(there, variables.params["values"].astype(jnp.int32))
    counted = there >= 0
    total = jnp.sum(counted, axis=1, dtype=jnp.float32)
    outside = jnp.sum(counted & ~known, axis=1, dtype=jnp.float32)
    return Loss(outside / jnp.maximum(total, 1), total)

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    del key
    return missed(variables, examples)

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    value, weight, _ = missed(variables, examples)
    return {"loss": Metric(value * weight, weight)}

  def check(examples: Mapping[str, np.ndarray]) -> None:
    stored = examples.get(field)
    if stored is None or not stored.size:
      return
    if stored.dtype.kind not in "iub":
      raise ValueError(
        f"model.name='heavy_hitters' counts whole numbers, and the field"
        f" {field!r} is {stored.dtype}; set model.field to the other one,"
        " or store whole numbers."
      )
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high >= size:
      raise ValueError(
        f"{name}={size}: values of {field!r} are from {low} to {high}; set"
        f" model.domain={max(high, 0) + 1} or more, and no value below 0."
      )

  return Task(init, loss, metrics, check=check, features=values, exact=True)
