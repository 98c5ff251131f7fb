"""Tasks: what a client trains, as pure functions."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import returned
from fedjax_sim.core.tree import in_float32
from fedjax_sim.core.types import EMPTY, Array, Examples, HParams, Key, PyTree


class Variables(NamedTuple):
  """A model's variables.

  Attributes:
    params: trained by gradients.
    buffers: changed by training without a gradient, such as batch statistics;
      averaged over clients, never clipped, negated or optimized.
    frozen: never changed by clients, such as the base model under LoRA. A
      device holds one copy, instead of one per lane. It does not count as sent;
      an algorithm whose server changes it names the changes in its message.
  """

  params: PyTree
  buffers: PyTree = ()
  frozen: PyTree = ()


class Loss(NamedTuple):
  """The loss of every example of a batch, before masking and averaging.

  Attributes:
    value: shape=(batch,), float; mean loss of each example. Must be finite and
      differentiable even where the weight is 0: masking stops a NaN in the
      forward pass, but not in the backward pass.
    weight: shape=(batch,), float; weight of each example, such as 1, or the
      number of tokens of a sentence.
    buffers: the buffers after this batch.
  """

  value: Array
  weight: Array
  buffers: PyTree = ()


class Metric(NamedTuple):
  """A weighted mean as two sums, `total / weight`.

  In a task's metrics both are per example, shape=(batch,); in a report they are
  sums over one client, shape=().

  Attributes:
    total: sum of weight * value.
    weight: sum of weights.
  """

  total: Array
  weight: Array


class PerExample(NamedTuple):
  """Values of every example, of which a `Joint` makes a number.

  Attributes:
    values: leaves (batch, ...); numbers or bools.
  """

  values: PyTree


class Joint(NamedTuple):
  """What makes a number of many examples at once that is no mean of theirs.

  It runs on the host, for every client of an evaluation and for all examples
  of a set, whose values are exactly those of their `PerExample`: without
  padding, in the order in which the examples are stored.

  Attributes:
    number: values, numpy, leaves (examples, ...) -> the number, or None where
      there is none, as of an AUC where all examples are of one class. With
      `names`, name -> number.
    names: values, or their shapes and dtypes -> names of several numbers, such
      as the cells of a table. None: there is one, called as the metric.
  """

  number: Callable[[PyTree], float | Mapping[str, float | None] | None]
  names: Callable[[PyTree], tuple[str, ...]] | None = None


class Batch(NamedTuple):
  """A batch of one client.

  Attributes:
    examples: field -> (batch, ...). Where `mask` is False the row repeats
      another example of the same client, so that batch statistics depend on the
      client's own data alone.
    mask: shape=(batch,), bool; False for padding.
  """

  examples: Examples
  mask: Array


class Task(NamedTuple):
  """What a client trains, as pure functions.

  Attributes:
    init: key -> variables.
    loss: (variables, examples, key) -> `Loss`, in training mode.
    metrics: (variables, examples) -> name -> `Metric` of per-example values,
      multiplied by their weights, or, of a name in `joint`, `PerExample`; in
      evaluation mode.
    check: stored examples, field -> numpy (examples, ...), -> None. Raises
      ValueError for values that the model cannot take, such as unknown ids.
      Shapes and dtypes need no check. For a field that is looked up in a table,
      receives the table.
    logits: (variables, examples) -> the model's outputs before any softmax,
      (batch, classes) for a classifier; in evaluation mode. None if unknown.
    higher_is_better: metric -> whether higher is better. A metric that is
      missing has no direction, and cannot select the best model or drive a
      schedule. May name metrics that the task lacks.
    hparams: name -> float; default numbers that `loss` reads. The examples
      receive each as a further field, shape=(batch,); a schedule may change
      them in training.
    joint: metric -> what makes its numbers, of those that are no means.
    features: (variables, examples) -> what the model makes of each example
      before its last layer, (batch, ...); in evaluation mode. None if unknown.
    exact: whether variables are no weights but numbers that count to the last
      digit, such as ids and thresholds, which no shorter dtype holds.
  """

  init: Callable[[Key], Variables]
  loss: Callable[[Variables, Examples, Key], Loss]
  # Each a `Metric`, or of a name in `joint` a `PerExample`.
  metrics: Callable[[Variables, Examples], dict[str, Any]]
  check: Callable[[Mapping[str, np.ndarray]], None] = lambda examples: None
  logits: Callable[[Variables, Examples], Array] | None = None
  higher_is_better: Mapping[str, bool] = types.MappingProxyType(
    {"loss": False, "accuracy": True}
  )
  hparams: HParams = EMPTY
  joint: Mapping[str, Joint] = EMPTY
  features: Callable[[Variables, Examples], Array] | None = None
  exact: bool = False


def mean_loss(
  task: Task, variables: Variables, batch: Batch, key: Key
) -> tuple[Array, tuple[PyTree, Metric]]:
  """Return the masked mean loss of a batch, ready for `jax.value_and_grad`.

  Example:
    >>> value_and_grad = jax.value_and_grad(
    ...   lambda params: mean_loss(
    ...     task, variables._replace(params=params), batch, key
    ...   ),
    ...   has_aux=True,
    ... )

  Args:
    task: the task.
    variables: the model's.
    batch: examples and mask.
    key: key of the local step.

  Returns:
    The loss, shape=(), and (buffers, `Metric` of the summed loss), in float32
    or wider. The loss of a batch without weight is 0, not NaN.

  Raises:
    TypeError, ValueError: `task.loss` returns something else than a `Loss`.
  """
  made = task.loss(variables, batch.examples, key)
  size, before = batch.mask.shape, variables.buffers
  value, weight, buffers = returned.loss(made, size, before)
  value, weight = in_float32((value, weight))
  weight = jnp.where(batch.mask, weight, 0)
  total = jnp.sum(jnp.where(weight > 0, value * weight, 0))
  count = jnp.sum(weight)
  mean = total / jnp.where(count > 0, count, 1)
  return mean, (buffers, Metric(total, count))


def sum_metrics(
  task: Task, variables: Variables, batch: Batch
) -> dict[str, Metric]:
  """Return the task's metrics, summed over a batch without its padding.

  Those of `Task.joint` have no sums, and are left out.

  Args:
    task: the task; its numbers keep their defaults.
    variables: the model's.
    batch: examples and mask.

  Returns:
    Name -> `Metric`, shape=(), float32 or wider.

  Raises:
    TypeError, ValueError: `task.metrics` returns something else.
  """
  return evaluate_batch(task, variables, batch)[0]


def evaluate_batch(
  task: Task, variables: Variables, batch: Batch
) -> tuple[dict[str, Metric], dict[str, PyTree]]:
  """Return what evaluation needs of a batch: sums, and examples' values.

  Args:
    task: the task; its numbers keep their defaults.
    variables: the model's.
    batch: examples and mask.

  Returns:
    What `sum_metrics` returns, and for each metric of `Task.joint` the values
    of all examples, padding included, leaves (batch, ...).

  Raises:
    TypeError, ValueError: `task.metrics` returns something else.
  """
  size = batch.mask.shape
  numbers = {k: jnp.full(size, x) for k, x in task.hparams.items()}
  made = task.metrics(variables, {**batch.examples, **numbers})
  checked = returned.metrics("Task.metrics", made, size, task.joint)
  means = {k: x for k, x in checked.items() if k not in task.joint}
  summed = jax.tree.map(
    lambda x: jnp.sum(jnp.where(batch.mask, x, 0)), in_float32(means)
  )
  return summed, {k: checked[k].values for k in task.joint}
