"""Metrics of a user's own, for any task with `Task.logits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Examples,
  Metric,
  PyTree,
  Task,
  Variables,
  errors,
  in_float32,
  returned,
  validate,
)
from fedjax_sim.core.errors import FedjaxSimError

# (outputs, examples) -> per-example values, shape=(batch,) each.
ExampleMetric = Callable[[PyTree, Examples], Metric | Array]


class MetricError(FedjaxSimError, ValueError):
  """A metric of the user's raises, or has a name that is taken."""


def with_metrics(task: Task, functions: Sequence[ExampleMetric]) -> Task:
  """Return the task with further metrics, each named as its function.

  Args:
    task: a task with `Task.logits`.
    functions: (outputs, examples) -> one number an example, shape=(batch,), or
      a `Metric` of such; outputs are what `Task.logits` gives. The attribute
      `higher_is_better` of a function, a bool, is its direction.

  Raises:
    TypeError: a function without a name, or whose direction is no bool.
    ValueError: the task has no logits, or two functions have the same name.
    MetricError: when it is traced: a function raises, returns something else,
      or has the name of a metric of the task.
  """
  field = "model.metrics"
  if task.logits is None:
    raise ValueError(
      f"{field} needs a task that tells its logits; give it Task.logits, or"
      " make it by nnx_task or linen_task."
    )
  outputs_of = task.logits
  named: dict[str, ExampleMetric] = {}
  directions = dict(task.higher_is_better)
  for function in functions:
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
      raise TypeError(
        f"{field}: {function!r} has no name; give a function made by def."
      )
    if name in named:
      raise ValueError(f"{field} has two named {name!r}; rename one.")
    named[name] = function
    directions.pop(name, None)  # of a metric that the task lacks
    better = getattr(function, "higher_is_better", None)
    if better is not None:
      what = f"{field}: {name}.higher_is_better"
      directions[name] = validate.boolean(what, better)

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    found = dict(task.metrics(variables, examples))
    outputs = outputs_of(variables, examples)
    for name, function in named.items():
      if name in (*found, *returned.COLUMNS):
        raise MetricError(
          f"{field}: the name {name!r} is taken; rename the function."
        )
      found[name] = _as_metric(name, function, outputs, examples)
    return found

  return task._replace(metrics=metrics, higher_is_better=directions)


def _as_metric(
  name: str, function: ExampleMetric, outputs: PyTree, examples: Examples
) -> Metric:
  """Return a metric function's values for a batch, in float32 at least."""
  try:
    said = function(outputs, examples)
    if not isinstance(said, Metric):
      value = jnp.asarray(said)
      said = Metric(value, jnp.ones(value.shape, jnp.float32))
    said = in_float32(said)
  except Exception as error:
    code = getattr(function, "__code__", None)
    text = errors.raised(code and code.co_filename, error)
    raise MetricError(f"model.metrics: {name!r}: {text}") from error
  batch = (len(next(iter(examples.values()))),)
  for array in said:
    if array.shape != batch:
      raise MetricError(
        f"model.metrics: {name!r} has shape {array.shape}; give one number an"
        f" example, shape {batch}."
      )
  return said
