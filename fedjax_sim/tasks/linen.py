"""Tasks from Flax linen modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
  errors,
  returned,
)
from fedjax_sim.tasks import losses
from fedjax_sim.tasks.fast_layers import with_fast_layers
from fedjax_sim.tasks.freezing import with_trainable
from fedjax_sim.tasks.losses import ExampleLoss, ExampleMetrics, cross_entropy
from fedjax_sim.tasks.nnx import Check, Inputs, tells_features


def linen_task(
  module: Any,
  example_input: Any,
  *,
  loss: ExampleLoss = cross_entropy,
  metrics: ExampleMetrics | None = None,
  train_argument: str | None = None,
  apply_kwargs: Callable[[bool], Mapping[str, Any]] | None = None,
  streams: tuple[str, ...] = ("dropout",),
  trainable: Sequence[str] | None = None,
  inputs: Inputs = lambda examples: examples["x"],
  check: Check = lambda examples: None,
  fast_layers: bool | None = None,
) -> Task:
  """Make a task from a `flax.linen` module.

  A module's method `features`, if it has one, is `Task.features`, as in
  `nnx_task`; it takes the same arguments as `__call__`.

  Args:
    module: the `nn.Module`.
    example_input: an input batch, or its `jax.ShapeDtypeStruct`.
    loss: as in `nnx_task`.
    metrics: as in `nnx_task`.
    train_argument: name of the module's boolean argument for training mode,
      e.g. "train"; short for `lambda train: {"train": train}`.
    apply_kwargs: train, a bool -> the module's named arguments, e.g.
      `lambda train: {"deterministic": not train}`.
    streams: names of the random streams that the module uses in training.
    trainable: patterns of the parameters that are trained, regular expressions
      on their paths, as `model.frozen` has them; others are frozen. None: all
      are trained.
    inputs: examples -> the module's argument.
    check: as in `Task`.
    fast_layers: as in `nnx_task`.

  Raises:
    TypeError, ValueError: arguments for training mode are given twice, or no
      dictionary; the module does not take its arguments; a pattern matches no
      parameter.

  Warns:
    UserWarning: a module with dropout or batch norm gets no argument for
      training mode.
  """
  arguments = _modes(train_argument, apply_kwargs)
  if not hasattr(example_input, "shape"):
    raise TypeError(
      f"linen_task: example_input is {returned.described(example_input)}; give"
      " a batch, for example jnp.zeros((1, 28, 28, 1)), or its"
      " jax.ShapeDtypeStruct."
    )
  x = jax.ShapeDtypeStruct(example_input.shape, example_input.dtype)
  _check_modes(module, x, arguments)
  evaluate = losses.evaluated(loss, metrics)

  def init(key: Key) -> Variables:
    zeros = jnp.zeros(x.shape, x.dtype)
    collections = dict(module.init(key, zeros, **arguments[False]))
    return Variables(collections.pop("params", {}), collections)

  def task_loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    outputs, buffers = module.apply(
      {"params": variables.params, **variables.buffers},
      inputs(examples),
      rngs={s: jax.random.fold_in(key, i) for i, s in enumerate(streams)},
      mutable=list(variables.buffers),
      **arguments[True],
    )
    value, weight = losses.value_and_weight(loss, outputs, examples)
    return Loss(value, weight, dict(buffers))

  def task_logits(variables: Variables, examples: Examples) -> Array:
    logits: Array = module.apply(
      {"params": variables.params, **variables.buffers},
      inputs(examples),
      **arguments[False],
    )
    return logits

  def task_features(variables: Variables, examples: Examples) -> Array:
    features: Array = module.apply(
      {"params": variables.params, **variables.buffers},
      inputs(examples),
      method="features",
      **arguments[False],
    )
    return features

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    return evaluate(task_logits(variables, examples), examples)

  has_features = tells_features(type(module))
  task = Task(
    *(init, task_loss, task_metrics, check, task_logits),
    features=task_features if has_features else None,
  )
  if trainable is not None:
    task = with_trainable(task, trainable)
  return with_fast_layers(task, fast_layers)


def _modes(
  train_argument: str | None,
  apply_kwargs: Callable[[bool], Mapping[str, Any]] | None,
) -> dict[bool, dict[str, Any]]:
  """Return training mode -> the named arguments of a linen module."""
  if apply_kwargs is None:
    names = () if train_argument is None else (train_argument,)
    return {train: dict.fromkeys(names, train) for train in (False, True)}
  if train_argument is not None:
    raise ValueError(
      f"linen_task: train_argument={train_argument!r} and apply_kwargs both"
      " give arguments for training mode; leave out train_argument."
    )
  modes = {}
  for train in (False, True):
    given = apply_kwargs(train)
    if not isinstance(given, Mapping):
      raise TypeError(
        f"linen_task: apply_kwargs({train}) returned"
        f" {returned.described(given)}; let it return a dictionary, for example"
        " lambda train: {'deterministic': not train}."
      )
    modes[train] = dict(given)
  return modes


def _check_modes(
  module: Any,
  x: jax.ShapeDtypeStruct,
  arguments: Mapping[bool, Mapping[str, Any]],
) -> None:
  """Refuse arguments that a module does not take; warn where one is missing."""
  from flax import linen  # here, as most models are nnx

  moody = set()

  def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    rates = (getattr(layer, name, 0) for name in ("rate", "dropout_rate"))
    drops = hasattr(layer, "deterministic") and any(rates)
    if drops or hasattr(layer, "use_running_average"):
      moody.add(type(layer).__name__)
    return call(*args, **kwargs)

  init = lambda key, x: module.init(key, x, **arguments[False])
  try:
    with linen.intercept_methods(look):
      jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), x)
  except Exception as error:
    raise ValueError(
      f"linen_task: {type(module).__name__} cannot be called with"
      f" {returned.described(x)}, and {dict(arguments[False])} by name:"
      f" {errors.raised(None, error)}. What it takes for training mode goes"
      " into apply_kwargs, for example lambda train: {'train': train}."
    ) from error
  if moody and arguments[True] == arguments[False]:
    warnings.warn(
      f"linen_task: {type(module).__name__} has {', '.join(sorted(moody))}, and"
      " is called in training as it is in evaluation; give the name of its"
      " argument for that, for example train_argument='train', or apply_kwargs,"
      " for example lambda train: {'deterministic': not train}.",
      stacklevel=3,
    )
