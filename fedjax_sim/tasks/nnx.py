"""Tasks from models: flax.nnx, flax.linen, or a plain pair of functions.

Also what acts on any task: lower precision and rematerialisation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

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
  references,
  returned,
)
from fedjax_sim.tasks import losses
from fedjax_sim.tasks.fast_layers import with_fast_layers
from fedjax_sim.tasks.freezing import with_trainable
from fedjax_sim.tasks.losses import ExampleLoss, ExampleMetrics, cross_entropy

Check = Callable[[Mapping[str, np.ndarray]], None]  # see `Task.check`
Inputs = Callable[[Examples], Array]


def _keep_statistics(args: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
  """Promotes (x, mean, var, scale, bias) of a batch norm, but not mean and var.

  By default nnx promotes all five, so with running statistics in float32
  whatever follows the layer would be computed in float32, too.
  """
  x, mean, var, *affine = args
  x, *affine = promote_dtype((x, *affine), **options)
  return (x, mean, var, *affine)


def nnx_task(
  make: Callable[[nnx.Rngs], nnx.Module],
  *,
  loss: ExampleLoss = cross_entropy,
  metrics: ExampleMetrics | None = None,
  trainable: Any = nnx.Param,
  inputs: Inputs = lambda examples: examples["x"],
  check: Check = lambda examples: None,
  fast_layers: bool | None = None,
) -> Task:
  """A task from a `flax.nnx` module.

  Variables that `trainable` selects are trained; other parameters are frozen;
  what is neither, such as batch statistics, are buffers. Random streams
  (dropout and others) are seeded anew with every step's key.

  Args:
    make: `nnx.Rngs` -> the module; called as `module(inputs(examples))`. A
      module itself is a TypeError.
    loss: (outputs, examples) -> (value, weight), shape=(batch,) each.
    metrics: (outputs, examples) -> name -> `Metric` of per-example values;
      `loss`, the one that trains, is added where it is missing. None: `loss`,
      and `accuracy` where labels are classes; see `losses.evaluated`.
    trainable: an nnx filter, e.g. `nnx.LoRAParam`.
    inputs: examples -> the module's argument.
    check: as in `Task`.
    fast_layers: compute convolution and pooling as `fast_layers.py` does; None:
      on a CPU.

  Raises:
    TypeError: `make` is no function.
    ValueError: the model has parameters, and `trainable` selects none.
  """
  if isinstance(make, nnx.Module):
    raise TypeError(
      f"nnx_task got a {type(make).__name__}; give the function that makes it,"
      f" lambda rngs: {type(make).__name__}(..., rngs=rngs)."
    )
  frozen = nnx.All(nnx.Param, nnx.Not(trainable))
  filters = (trainable, frozen, nnx.RngState, ...)

  evaluate = losses.evaluated(loss, metrics)

  def structure(mode: str) -> tuple[nnx.GraphDef[Any], PyTree]:
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    getattr(module, mode)()
    for _, part in nnx.iter_modules(module):
      if (
        isinstance(part, nnx.BatchNorm) and part.promote_dtype is promote_dtype
      ):
        part.promote_dtype = cast(Any, _keep_statistics)
    graphdef, *states = nnx.split(module, *filters)
    _check_trained(trainable, *states[:2])
    return graphdef, states[2]

  training, rng_shapes = structure("train")
  evaluating, _ = structure("eval")
  streams = sorted(
    {
      rng.tag
      for rng in jax.tree.leaves(
        rng_shapes, is_leaf=lambda x: isinstance(x, nnx.RngKey)
      )
      if isinstance(rng, nnx.RngKey)
    }
  )

  def init(key: Key) -> Variables:
    module = make(nnx.Rngs(key))
    _, *states = nnx.split(module, *filters)
    params, kept, _, buffers = states
    return Variables(params, buffers, kept)

  def module_of(
    graphdef: nnx.GraphDef[Any], variables: Variables, key: Key
  ) -> Any:
    def blank(x: jax.ShapeDtypeStruct) -> Array:
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(key, x.shape)
      return jnp.zeros(x.shape, x.dtype)

    # Without copy=True the module would alias the caller's variables.
    module = nnx.merge(
      graphdef,
      variables.params,
      variables.frozen,
      jax.tree.map(blank, rng_shapes),
      variables.buffers,
      copy=True,
    )
    # Without new keys all lanes and steps would share one dropout mask.
    keys: dict[str, Any] = {
      s: jax.random.fold_in(key, i) for i, s in enumerate(streams)
    }
    nnx.reseed(module, policy="match_shape", **keys)
    return module

  def task_loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    module = module_of(training, variables, key)
    outputs = module(inputs(examples))
    value, weight = losses.value_and_weight(loss, outputs, examples)
    _, *states = nnx.split(module, *filters)
    return Loss(value, weight, states[3])

  def task_logits(variables: Variables, examples: Examples) -> Array:
    module = module_of(evaluating, variables, jax.random.key(0))
    logits: Array = module(inputs(examples))
    return logits

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    return evaluate(task_logits(variables, examples), examples)

  task = Task(init, task_loss, task_metrics, check, task_logits)
  return with_fast_layers(task, fast_layers)


def _check_trained(trainable: Any, trained: PyTree, kept: PyTree) -> None:
  """Refuse a filter that selects none of a model's parameters."""
  if jax.tree.leaves(trained) or not jax.tree.leaves(kept):
    return
  variable = lambda x: isinstance(x, nnx.Variable)
  kinds = {type(x).__name__ for x in jax.tree.leaves(kept, is_leaf=variable)}
  raise ValueError(
    f"nnx_task: trainable={getattr(trainable, '__name__', trainable)} selects"
    " none of the model's variables, so nothing would train; there are"
    f" {', '.join(sorted(kinds))}. Give nnx.Param, or the type of some."
  )


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
  """A task from a `flax.linen` module.

  Args:
    module: the `nn.Module`.
    example_input: an input batch, or its `jax.ShapeDtypeStruct`.
    loss: as in `nnx_task`.
    metrics: as in `nnx_task`.
    train_argument: name of the module's boolean argument for training mode,
      e.g. "train"; short for `lambda train: {"train": train}`.
    apply_kwargs: train, a bool -> the module's named arguments, e.g.
      `lambda train: {"deterministic": not train}`.
    streams: names of the random streams it draws from in training.
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

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    return evaluate(task_logits(variables, examples), examples)

  task = Task(init, task_loss, task_metrics, check, task_logits)
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
      f" {references.raised(None, error)}. What it takes for training mode goes"
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
  """A task from a plain pair of functions.

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


def _cast(tree: PyTree, dtype: Any) -> PyTree:
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    tree,
  )


def with_compute_dtype(
  task: Task, dtype: Any, *, targets: tuple[str, ...] = ("y",)
) -> Task:
  """The task computed in `dtype`, e.g. bfloat16.

  Parameters, optimisers, updates and their sums stay in float32; losses and
  metrics are reduced in float32.

  Args:
    task: the task.
    dtype: what parameters and inputs are cast to before they are used.
    targets: fields of the examples that are not cast.
  """

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

  task_logits = None if task.logits is None else logits
  return task._replace(loss=loss, metrics=metrics, logits=task_logits)


def with_remat(task: Task) -> Task:
  """The task with its activations recomputed in the backward pass."""
  logits = None if task.logits is None else jax.checkpoint(task.logits)
  return task._replace(loss=jax.checkpoint(task.loss), logits=logits)
