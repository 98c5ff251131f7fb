"""Quantiles of numbers that examples hold, as a model.

Its loss is the pinball loss, which quantiles minimize (Koenker and Bassett
1978, "Regression quantiles"), so gradient steps move towards them. The
algorithm `quantiles` reads them from a histogram of the clients' instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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

FARTHEST = 1e30  # so that float32 holds the width of any range


def quantiles(
  example_shape: tuple[int, ...],
  num_classes: int,
  probabilities: Sequence[float] = (0.25, 0.5, 0.75),
  feature: int | None = None,
  low: float = 0.0,
  high: float = 1.0,
) -> Task:
  """Return quantiles that begin evenly in a range known beforehand.

  `Variables.params` is `quantiles`, shape=(features, probabilities), float32,
  and `Variables.frozen` are `low`, `high` and `probabilities`. The loss of an
  example is the pinball loss, averaged over features and probabilities. What
  `Task.features` returns are the numbers, shape=(batch, features).

  Args:
    example_shape: shape of one input.
    num_classes: not used.
    probabilities: which quantiles, ascending, each in (0, 1).
    feature: which number of the flattened input; None: all of them, each by
      itself.
    low: the least that a number may be.
    high: the greatest.

  Raises:
    TypeError, ValueError: names the field.

  Example:
    >>> task = quantiles((4,), 0, probabilities=(0.5, 0.9), feature=2)
    >>> task.init(jax.random.key(0)).params["quantiles"].shape
    (1, 2)
  """
  del num_classes
  size = math.prod(example_shape)
  wanted = [
    validate.number(f"probabilities[{i}]", p, gt=0, lt=1)
    for i, p in enumerate(probabilities)
  ]
  if not wanted or wanted != sorted(set(wanted)):
    raise ValueError(
      f"probabilities={tuple(probabilities)!r} are not ascending; give such as"
      " (0.25, 0.5, 0.75)."
    )
  if feature is not None:
    feature = validate.integer("feature", feature, ge=0, le=size - 1)
  low = validate.number("low", low, ge=-FARTHEST, le=FARTHEST)
  high = validate.number("high", high, gt=low, le=FARTHEST)

  def init(key: Key) -> Variables:
    del key
    levels = jnp.asarray(wanted, jnp.float32)
    count = size if feature is None else 1
    even = jnp.tile(low + (high - low) * levels[None], (count, 1))
    frozen = {
      "low": jnp.float32(low),
      "high": jnp.float32(high),
      "probabilities": levels,
    }
    return Variables({"quantiles": even}, frozen=frozen)

  def numbers(variables: Variables, examples: Examples) -> Array:
    del variables
    x = examples["x"]
    x = x.reshape(x.shape[0], -1)
    return x if feature is None else x[:, feature][:, None]

  def pinball(variables: Variables, examples: Examples) -> Array:
    gaps = numbers(variables, examples)[..., None]
    gaps = gaps - variables.params["quantiles"][None]
    levels = variables.frozen["probabilities"][None, None]
    each = jnp.maximum(levels * gaps, (levels - 1) * gaps)
    return jnp.mean(each, axis=(1, 2))

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    del key
    value = pinball(variables, examples)
    return Loss(value, jnp.ones_like(value))

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    value = pinball(variables, examples)
    return {"loss": Metric(value, jnp.ones_like(value))}

  return Task(init, loss, metrics, features=numbers, exact=True)
