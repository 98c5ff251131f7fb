"""Tasks: what a client trains, as pure functions."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import returned
from fedjax_sim.core.tree import in_float32
from fedjax_sim.core.types import EMPTY, Array, Examples, HParams, Key, PyTree


class Variables(NamedTuple):
  """A model's variables.

  Attributes:
    params: what is trained.
    buffers: what training changes without a gradient, such as batch
      statistics: averaged over clients, never clipped, negated or optimised.
    frozen: what nobody changes, such as the base model under LoRA: one copy a
      device, not one a lane.
  """

  params: PyTree
  buffers: PyTree = ()
  frozen: PyTree = ()


class Loss(NamedTuple):
  """The loss of every example of a batch, before the engine masks and means.

  Attributes:
    value: shape=(batch,), float; the mean loss of each example. It must be
      finite and differentiable where the weight is 0, too: a mask stops a NaN
      on the way forward, not on the way back.
    weight: shape=(batch,), float; what each example counts: 1, or the number
      of tokens in a sentence.
    buffers: the buffers after this batch.
  """

  value: Array
  weight: Array
  buffers: PyTree = ()


class Metric(NamedTuple):
  """A weighted mean in the making: `total / weight`.

  A task's metrics hold per-example arrays, shape=(batch,), a report's hold
  sums over one client, shape=().
  """

  total: Array
  weight: Array


class Batch(NamedTuple):
  """A client's batch.

  Attributes:
    examples: field -> (batch, ...). Where `mask` is false the row repeats
      another example of the same client, so that batch statistics see only the
      client's own data.
    mask: shape=(batch,), bool; false marks padding.
  """

  examples: Examples
  mask: Array


class Task(NamedTuple):
  """What a client trains, as pure functions.

  Attributes:
    init: key -> variables.
    loss: (variables, examples, key) -> `Loss`; training mode.
    metrics: (variables, examples) -> name -> `Metric` of per-example values
      (already multiplied by their weights); evaluation mode.
    check: examples as they are stored, field -> numpy (examples, ...), -> None;
      raises ValueError for values that the model cannot take, such as ids that
      it does not know. Shapes and dtypes need no check. Of a field that is
      looked up in a table it gets the table.
    logits: (variables, examples) -> what the model says before any softmax,
      (batch, classes) of a classifier; evaluation mode. None: it is not told.
    higher_is_better: metric -> whether more of it is better; a metric that is
      missing here has no direction, and cannot choose the best model or a rate.
      It may name metrics that the task lacks.
    hparams: name -> float; default numbers that `loss` takes. Examples have
      each as one more field, shape=(batch,); in training a schedule may change
      them.
  """

  init: Callable[[Key], Variables]
  loss: Callable[[Variables, Examples, Key], Loss]
  metrics: Callable[[Variables, Examples], dict[str, Metric]]
  check: Callable[[Mapping[str, np.ndarray]], None] = lambda examples: None
  logits: Callable[[Variables, Examples], Array] | None = None
  higher_is_better: Mapping[str, bool] = types.MappingProxyType(
    {"loss": False, "accuracy": True}
  )
  hparams: HParams = EMPTY


def mean_loss(
  task: Task, variables: Variables, batch: Batch, key: Key
) -> tuple[Array, tuple[PyTree, Metric]]:
  """The masked mean loss of a batch, ready for `jax.value_and_grad`.

  Returns:
    The loss, shape=(), and (buffers, `Metric` of the summed loss), in float32
    at least. A batch without weight has loss 0, not NaN.
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
  """The task's metrics, summed over a batch without its padding.

  Returns:
    name -> `Metric`, shape=(), float32 at least.
  """
  size = batch.mask.shape
  numbers = {k: jnp.full(size, x) for k, x in task.hparams.items()}
  made = task.metrics(variables, {**batch.examples, **numbers})
  metrics = in_float32(returned.metrics("Task.metrics", made, size))
  return jax.tree.map(lambda x: jnp.sum(jnp.where(batch.mask, x, 0)), metrics)
