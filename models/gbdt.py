"""Boosted trees of a fixed shape: what an example adds up over all of them.

All trees are complete. The algorithm `gbdt` grows them; nothing here has a
useful gradient.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

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
from fedjax_sim.training.trees import descended

OBJECTIVES = ("logistic", "squared")
FARTHEST = 1e30  # so that float32 holds the width of any range


def gbdt(
  example_shape: tuple[int, ...],
  num_classes: int,
  trees: int = 20,
  depth: int = 4,
  objective: str = "logistic",
  low: float = 0.0,
  high: float = 1.0,
) -> Task:
  """Return trees without splits, whose leaves are all 0.

  `Variables.params` are float32: `features`, whole numbers, and `thresholds`,
  both shape=(trees, 2^depth - 1), the splits of each tree level by level, and
  `values`, shape=(trees, 2^depth), its leaves. An example goes right where its
  feature is not below the threshold. Its margin is the sum of its leaves.
  `Variables.frozen` is the range of every feature, `low` and `high`,
  shape=(features,).

  Args:
    example_shape: shape of one input.
    num_classes: 2 for `logistic`.
    trees: how many.
    depth: splits between root and leaf.
    objective: `logistic`, the log loss of labels 0 and 1, or `squared`, half
      the squared difference of margin and label.
    low: the least that a feature may be.
    high: the greatest.

  Raises:
    TypeError, ValueError: names the field.

  Example:
    >>> task = gbdt((5,), 2, trees=3, depth=2)
    >>> task.init(jax.random.key(0)).params["features"].shape
    (3, 3)
  """
  count = validate.integer("trees", trees, le=10_000)
  levels = validate.integer("depth", depth, le=10)
  logistic = validate.one_of("objective", objective, OBJECTIVES) == "logistic"
  if logistic and validate.integer("num_classes", num_classes) != 2:
    raise ValueError(
      f"objective='logistic' is for two classes, and the data have"
      f" {num_classes}; set objective='squared', which fits the labels as"
      " numbers."
    )
  low = validate.number("low", low, ge=-FARTHEST, le=FARTHEST)
  high = validate.number("high", high, gt=low, le=FARTHEST)
  features = math.prod(example_shape)

  def init(key: Key) -> Variables:
    del key
    params = {
      "features": jnp.zeros((count, 2**levels - 1), jnp.float32),
      "thresholds": jnp.full(
        (count, 2**levels - 1), jnp.finfo(jnp.float32).max
      ),
      "values": jnp.zeros((count, 2**levels), jnp.float32),
    }
    ends = {"low": low, "high": high}
    bounds = {k: jnp.full((features,), v, jnp.float32) for k, v in ends.items()}
    return Variables(params, frozen=bounds)

  def margins(variables: Variables, examples: Examples) -> Array:
    x = examples["x"]
    x = x.reshape(x.shape[0], -1)

    def one(tree: dict[str, Array]) -> Array:
      leaf = descended(x, tree["features"], tree["thresholds"], levels)
      return tree["values"][leaf]

    return jnp.sum(jax.vmap(one)(variables.params), axis=0)

  def logits(variables: Variables, examples: Examples) -> Array:
    margin = margins(variables, examples)
    if not logistic:
      return margin[:, None]
    return jnp.stack([jnp.zeros_like(margin), margin], axis=1)

  def values(variables: Variables, examples: Examples) -> Array:
    margin, y = margins(variables, examples), examples["y"]
    if logistic:
      return jax.nn.softplus(jnp.where(y > 0, -margin, margin))
    return 0.5 * (margin - y.astype(margin.dtype)) ** 2

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    del key
    value = values(variables, examples)
    return Loss(value, jnp.ones_like(value))

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    value = values(variables, examples)
    ones = jnp.ones_like(value)
    found = {"loss": Metric(value, ones)}
    if logistic:
      right = (margins(variables, examples) > 0) == (examples["y"] > 0)
      found["accuracy"] = Metric(right.astype(value.dtype), ones)
    return found

  return Task(init, loss, metrics, logits=logits, exact=True)
