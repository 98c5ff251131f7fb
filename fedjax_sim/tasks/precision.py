"""Lower precision and rematerialization, for any task."""

from __future__ import annotations

from typing import Any

import jax
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
  in_float32,
)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    tree,
  )


def check_inexact(field: str, task: Task, dtype: Any) -> None:
  """Refuse another dtype for a model whose numbers count to the last digit.

  Args:
    field: how messages call it.
    task: whose model.
    dtype: which it would get.

  Raises:
    ValueError: it is such a model, see `Task.exact`.
  """
  if task.exact:
    raise ValueError(
      f"{field}={jnp.dtype(dtype).name!r} would round what the model holds,"
      " such as ids, thresholds or probabilities; leave it at 'float32'."
    )


def with_compute_dtype(
  task: Task, dtype: Any, *, targets: tuple[str, ...] = ("y",)
) -> Task:
  """Return the task computed in `dtype`, e.g. bfloat16.

  Parameters, optimizers, updates and their sums stay in float32; losses and
  metrics are reduced in float32.

  Args:
    task: the task.
    dtype: what parameters and inputs are cast to before they are used.
    targets: fields of the examples that are not cast.

  Raises:
    ValueError: the task's variables have to be exact.
  """
  check_inexact("runtime.compute_dtype", task, dtype)

  def lower(variables: Variables) -> Variables:
    params, buffers, frozen = variables
    return Variables(_cast(params, dtype), buffers, _cast(frozen, dtype))

  def inputs(examples: Examples) -> Examples:
    return {
      name: x if name in targets else _cast(x, dtype)
      for name, x in examples.items()
    }

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    value, weight, buffers = task.loss(lower(variables), inputs(examples), key)
    buffers = jax.tree.map(
      lambda new, old: new.astype(old.dtype), buffers, variables.buffers
    )
    return Loss(in_float32(value), in_float32(weight), buffers)

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    return jax.tree.map(
      in_float32, task.metrics(lower(variables), inputs(examples))
    )

  def logits(variables: Variables, examples: Examples) -> Array:
    assert task.logits is not None
    return in_float32(task.logits(lower(variables), inputs(examples)))

  def features(variables: Variables, examples: Examples) -> Array:
    assert task.features is not None
    return in_float32(task.features(lower(variables), inputs(examples)))

  return task._replace(
    loss=loss,
    metrics=metrics,
    logits=None if task.logits is None else logits,
    features=None if task.features is None else features,
  )


def with_remat(task: Task) -> Task:
  """Return the task with its activations recomputed in the backward pass."""
  remat = lambda function: function and jax.checkpoint(function)
  return task._replace(
    loss=remat(task.loss),
    logits=remat(task.logits),
    features=remat(task.features),
  )
