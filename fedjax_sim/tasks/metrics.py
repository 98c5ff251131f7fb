"""Metrics of a user's own, for any task with `Task.logits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Examples,
  Joint,
  Metric,
  PerExample,
  PyTree,
  Task,
  Variables,
  errors,
  in_float32,
  returned,
  validate,
)
from fedjax_sim.core.errors import FedjaxSimError

T = TypeVar("T")

# (outputs, examples) -> per-example values, shape=(batch,) each. Of a function
# with the attribute `number`: any such values, leaves (batch, ...).
ExampleMetric = Callable[..., Any]

FIELD = "model.metrics"


class MetricError(FedjaxSimError, ValueError):
  """A metric does not fit the task, raises, or has a name that is taken."""


def with_metrics(task: Task, functions: Sequence[ExampleMetric]) -> Task:
  """Return the task with further metrics, each named as its function.

  Args:
    task: a task with `Task.logits`.
    functions: (outputs, examples) -> one number an example, shape=(batch,), or
      a `Metric` of such; outputs are what `Task.logits` gives. The attribute
      `higher_is_better` of a function, a bool, is its direction. One with the
      attribute `number` is no mean: it returns arrays, leaves (batch, ...), and
      `number` makes a number of them; see `Joint`, as to `names`, too.

  Raises:
    TypeError: a function without a name, or whose direction is no bool.
    ValueError: the task has no logits, or two functions have the same name.
    MetricError: when it is traced: a function raises, returns something else,
      or has the name of a metric of the task.
  """
  if task.logits is None:
    raise ValueError(
      f"{FIELD} needs a task that tells its logits; give it Task.logits, or"
      " make it by nnx_task or linen_task."
    )
  outputs_of = task.logits
  named: dict[str, ExampleMetric] = {}
  directions = dict(task.higher_is_better)
  joint = dict(task.joint)
  for function in functions:
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
      raise TypeError(
        f"{FIELD}: {function!r} has no name; give a function made by def."
      )
    if name in named:
      raise ValueError(f"{FIELD} has two named {name!r}; rename one.")
    named[name] = function
    directions.pop(name, None)  # of a metric that the task lacks
    better = getattr(function, "higher_is_better", None)
    if better is not None:
      what = f"{FIELD}: {name}.higher_is_better"
      directions[name] = validate.boolean(what, better)
    if hasattr(function, "number"):
      joint[name] = _joint(name, function)

  def metrics(variables: Variables, examples: Examples) -> dict[str, Any]:
    found = dict(task.metrics(variables, examples))
    outputs = outputs_of(variables, examples)
    for name, function in named.items():
      if name in (*found, *returned.COLUMNS):
        raise MetricError(
          f"{FIELD}: the name {name!r} is taken; rename the function."
        )
      needed: tuple[Metric, ...] = ()
      if needs := getattr(function, "needs", None):
        if needs not in found:
          raise MetricError(
            f"{FIELD}: {name!r} is made of the metric {needs!r}, and the model"
            f" has {', '.join(found) or 'none'}; leave it out."
          )
        needed = (found[needs],)
      as_ = _as_values if name in joint else _as_metric
      found[name] = as_(name, function, outputs, examples, *needed)
    return found

  return task._replace(
    metrics=metrics, higher_is_better=directions, joint=joint
  )


def _as_metric(name: str, function: ExampleMetric, *arguments: Any) -> Metric:
  """Return a metric function's values for a batch, in float32 at least."""

  def said() -> Metric:
    made = function(*arguments)
    if not isinstance(made, Metric):
      value = jnp.asarray(made)
      made = Metric(value, jnp.ones(value.shape, jnp.float32))
    return in_float32(made)

  metric = _called(name, function, said)
  batch = _batch_shape(arguments[1])
  for array in metric:
    if array.shape != batch:
      raise MetricError(
        f"{FIELD}: {name!r} has shape {array.shape}; give one number an"
        f" example, shape {batch}."
      )
  return metric


def _as_values(
  name: str, function: ExampleMetric, *arguments: Any
) -> PerExample:
  """Return what a function with `number` says of a batch."""
  arrays = lambda: jax.tree.map(jnp.asarray, function(*arguments))
  values = _called(name, function, arrays)
  batch = _batch_shape(arguments[1])
  for array in jax.tree.leaves(values):
    if array.shape[:1] != batch:
      raise MetricError(
        f"{FIELD}: {name!r} has shape {array.shape}; give values of every"
        f" example, shape ({batch[0]}, ...)."
      )
  return PerExample(values)


def _joint(name: str, function: Any) -> Joint:
  """Return what makes the numbers of a function with `number`.

  Raises:
    TypeError: `number` is no function, or `names` neither one nor a tuple.
  """
  number, names = function.number, getattr(function, "names", None)
  if not callable(number):
    raise TypeError(
      f"{FIELD}: {name}.number is {returned.described(number)}; give a function"
      " of the values that the metric returns."
    )
  if isinstance(names, tuple):
    for one in names:
      returned.check_name(f"{FIELD}: {name}.names", one)
  elif names is not None and not callable(names):
    raise TypeError(
      f"{FIELD}: {name}.names is {returned.described(names)}; give a tuple, for"
      " example ('precision', 'recall')."
    )
  names_of = (lambda values: names) if isinstance(names, tuple) else names

  def as_float(value: Any) -> float | None:
    return None if value is None else float(value)

  def checked(values: PyTree) -> float | dict[str, float | None] | None:
    def said() -> float | dict[str, float | None] | None:
      made = number(values)
      if names_of is None:
        return as_float(made)
      return {key: as_float(made[key]) for key in names_of(values)}

    return _called(f"{name}.number", number, said)

  return Joint(checked, names_of)


def _called(name: str, function: Any, said: Callable[[], T]) -> T:
  """Return what a function of the user's says; an error names it."""
  try:
    return said()
  except MetricError:
    raise
  except Exception as error:
    text = errors.raised(errors.code_file(function), error)
    raise MetricError(f"{FIELD}: {name!r}: {text}") from error


def _batch_shape(examples: Examples) -> tuple[int]:
  return (len(next(iter(examples.values()))),)
