"""Losses and metrics of what a model says of a batch, example by example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Examples,
  Metric,
  PyTree,
  in_float32,
  returned,
)

# (outputs, examples) -> (value, weight), both shape=(batch,).
ExampleLoss = Callable[[PyTree, Examples], tuple[Array, Array]]
# (outputs, examples) -> name -> `Metric` of per-example values.
ExampleMetrics = Callable[[PyTree, Examples], dict[str, Metric]]


def negative_log_likelihood(logits: Array, labels: Array) -> Array:
  """Return -log softmax(logits)[label], NaN for a label that is no class.

  Picks by comparing, not by indexing as optax does, which takes a gather and,
  in the gradient, a scatter.

  Args:
    logits: shape=(..., classes).
    labels: shape=(...,), integer.
  """
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(
      f"cross-entropy takes labels that are classes, whole numbers, and 'y' is"
      f" {labels.dtype}; give a loss of your own, for example loss=lambda"
      " outputs, examples: ((outputs[:, 0] - examples['y']) ** 2,"
      " jnp.ones(len(outputs)))."
    )
  logits = in_float32(logits)
  classes = logits.shape[-1]
  hit = jax.nn.one_hot(labels, classes, dtype=bool)
  picked = lambda numbers: jnp.sum(jnp.where(hit, numbers, 0), axis=-1)
  if jax.default_backend() == "cpu":
    value = jax.nn.logsumexp(logits, axis=-1) - picked(logits)
  else:  # a form that XLA for GPUs knows, and computes in one kernel
    value = -picked(jax.nn.log_softmax(logits))
  return jnp.where((labels >= 0) & (labels < classes), value, jnp.nan)


def cross_entropy(logits: Array, examples: Examples) -> tuple[Array, Array]:
  """Return the softmax cross-entropy with integer labels, and weights of 1.

  Args:
    logits: shape=(batch, classes).
    examples: with `y`, shape=(batch,), integer.
  """
  value = negative_log_likelihood(logits, examples["y"])
  return value, jnp.ones_like(value)


def classification_metrics(
  logits: Array, examples: Examples
) -> dict[str, Metric]:
  """Return `loss` and `accuracy`; shapes as in `cross_entropy`."""
  value, weight = cross_entropy(logits, examples)
  hit = jnp.argmax(logits, axis=-1) == examples["y"]
  return {
    "loss": Metric(value * weight, weight),
    "accuracy": Metric(hit.astype(value.dtype) * weight, weight),
  }


def token_cross_entropy(
  logits: Array, examples: Examples
) -> tuple[Array, Array]:
  """Return the mean cross-entropy over tokens; 0 in `y` is padding.

  Args:
    logits: shape=(batch, time, tokens).
    examples: with `y`, shape=(batch, time), integer.

  Returns:
    The mean over each sequence's tokens that are not padding, and how many
    those are, shape=(batch,) each.
  """
  values, real = _tokens(logits, examples)
  count = real.sum(-1)
  return values.sum(-1) / jnp.maximum(count, 1), count


def token_metrics(logits: Array, examples: Examples) -> dict[str, Metric]:
  """Return `loss` and `accuracy` per token, for `token_cross_entropy`."""
  values, real = _tokens(logits, examples)
  return {
    "loss": Metric(values.sum(-1), real.sum(-1)),
    "accuracy": token_hits(logits, examples),
  }


def token_hits(
  logits: Array, examples: Examples, wrong: int | None = None
) -> Metric:
  """Return the accuracy per token; 0 in `y` is padding.

  Args:
    logits: shape=(batch, time, tokens).
    examples: with `y`, shape=(batch, time), integer.
    wrong: a token whose prediction is never right; None: there is none.
  """
  y, said = examples["y"], jnp.argmax(logits, axis=-1)
  real = y != 0
  hit = (said == y) & real
  if wrong is not None:
    hit &= said != wrong
  count = lambda x: in_float32(x.sum(-1))
  return Metric(count(hit), count(real))


def _tokens(logits: Array, examples: Examples) -> tuple[Array, Array]:
  """Return each token's loss and weight, 0 for padding; (batch, time)."""
  values = negative_log_likelihood(logits, examples["y"])
  real = (examples["y"] != 0).astype(values.dtype)
  return values * real, real


# --- a user's own -------------------------------------------------------------


def value_and_weight(
  loss: ExampleLoss, outputs: PyTree, examples: Examples
) -> tuple[Array, Array]:
  """Return a loss's value and weight, shape=(batch,) each.

  Raises:
    TypeError: the loss returned something else.
  """
  value, weight = returned.parts(
    returned.named("loss", loss),
    loss(outputs, examples),
    ("value", "weight"),
    "value, jnp.ones_like(value)",
  )
  return value, weight


def evaluated(
  loss: ExampleLoss, metrics: ExampleMetrics | None
) -> ExampleMetrics:
  """Return the metrics of a task that trains this loss.

  The metric `loss` is always the loss that trains.

  Args:
    loss: the loss that trains.
    metrics: further metrics. None: `accuracy` where there are classes. With a
      user's own loss there are classes if labels "y" are integers,
      shape=(batch,), and outputs an array, shape=(batch, classes), of two or
      more classes; examples of weight 0 do not count.
  """
  if metrics is not None and not callable(metrics):
    raise TypeError(
      f"metrics is {returned.described(metrics)}; give one function, (outputs,"
      " examples) -> dictionary of metrics."
    )
  if metrics is None and loss is cross_entropy:
    return classification_metrics
  if metrics is None and loss is token_cross_entropy:
    return token_metrics

  def of_both(outputs: PyTree, examples: Examples) -> dict[str, Metric]:
    further = {}
    if metrics is not None:
      what = returned.named("metrics function", metrics)
      further = returned.metrics(what, metrics(outputs, examples))
    if metrics in (classification_metrics, token_metrics):
      further.pop("loss")  # of another loss, perhaps
    if "loss" in further:
      raise ValueError(
        f"{what} returned 'loss', which evaluation has already: the loss that"
        " trains; rename it, for example 'error'."
      )
    value, weight = in_float32(value_and_weight(loss, outputs, examples))
    found = {"loss": Metric(jnp.where(weight > 0, value * weight, 0), weight)}
    if metrics is None and _has_classes(outputs, examples):
      hit = jnp.argmax(outputs, axis=-1) == examples["y"]
      counts = in_float32(weight > 0)
      found["accuracy"] = Metric(hit * counts, counts)
    return {**found, **further}

  return of_both


def _has_classes(outputs: Any, examples: Examples) -> bool:
  """Return whether outputs are scores of classes and "y" are their labels."""
  y = examples.get("y")
  return (
    y is not None
    and jnp.issubdtype(y.dtype, jnp.integer)
    and y.ndim == 1
    and getattr(outputs, "shape", ())[:-1] == y.shape
    and outputs.shape[-1] > 1
  )
