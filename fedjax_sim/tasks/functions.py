"""Tasks from plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  PyTree,
  Task,
  Variables,
  returned,
)
from fedjax_sim.tasks.fast_layers import with_fast_layers
from fedjax_sim.tasks.freezing import with_trainable
from fedjax_sim.tasks.nnx import Check


def function_task(
  init: Callable[[Key], PyTree],
  loss: Callable[[PyTree, Examples], Array],
  metrics: Callable[[PyTree, Examples], Mapping[str, Metric | Array]]
  | None = None,
  *,
  trainable: Sequence[str] | None = None,
  check: Check = lambda examples: None,
  fast_layers: bool | None = None,
) -> Task:
  """Make a task from plain functions.

  Args:
    init: key -> params.
    loss: (params, examples) -> the loss of each example, shape=(batch,).
    metrics: (params, examples) -> name -> value of each example, or a `Metric`
      of such; `loss` is added where it is missing.
    trainable: as in `linen_task`.
    check: as in `Task`.
    fast_layers: as in `nnx_task`.

  Raises:
    TypeError, ValueError: a pattern of `trainable` matches no parameter.
  """

  def value_of(params: PyTree, examples: Examples) -> Array:
    value = loss(params, examples)
    if not hasattr(value, "shape"):
      raise TypeError(
        f"{returned.named('loss', loss)} returned {returned.described(value)};"
        " let it return the loss of each example, an array of shape (batch,),"
        " for example (predicted - examples['y']) ** 2."
      )
    return value

  def task_loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    del key
    value = value_of(variables.params, examples)
    return Loss(value, jnp.ones_like(value))

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    found: dict[str, Any] = {"loss": value_of(variables.params, examples)}
    if metrics is not None:
      further = metrics(variables.params, examples)
      if not isinstance(further, Mapping):
        raise TypeError(
          f"{returned.named('metrics function', metrics)} returned"
          f" {returned.described(further)}; let it return a dictionary, for"
          " example {'error': value}."
        )
      for name in further:  # here, since JAX sorts names
        returned.check_name("Task.metrics", name)
      found |= further
    one = lambda x: jnp.ones(jnp.shape(x), jnp.float32)
    return {
      name: x if isinstance(x, Metric) else Metric(x, one(x))
      for name, x in found.items()
    }

  begin = lambda key: Variables(init(key))
  task = Task(begin, task_loss, task_metrics, check)
  if trainable is not None:
    task = with_trainable(task, trainable)
  return with_fast_layers(task, fast_layers)
