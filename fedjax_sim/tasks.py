"""Tasks from models: flax.nnx, flax.linen, or a plain pair of functions.

Also what acts on any task: further metrics, lower precision and
rematerialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from fedjax_sim import references, validate
from fedjax_sim.base import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  PyTree,
  Task,
  Variables,
)
from fedjax_sim.fast_layers import with_fast_layers

# (outputs, examples) -> (value, weight), both shape=(batch,).
ExampleLoss = Callable[[PyTree, Examples], tuple[Array, Array]]
ExampleMetrics = Callable[[PyTree, Examples], dict[str, Metric]]
# (outputs, examples) -> per-example values, shape=(batch,) each.
ExampleMetric = Callable[[PyTree, Examples], Metric | Array]


class MetricError(ValueError):
  """A metric of the user's raises, or has a name that is taken."""


def _float32(x: Array) -> Array:
  """At least float32: sums and softmaxes of bfloat16 lose too much."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _negative_log_likelihood(logits: Array, labels: Array) -> Array:
  """-log softmax(logits)[label], NaN for a label that is no class.

  Picks by comparing, not by indexing as optax does, which takes a gather and,
  in the gradient, a scatter.

  Args:
    logits: shape=(..., classes).
    labels: shape=(...,), integer.
  """
  logits = _float32(logits)
  classes = logits.shape[-1]
  hit = jax.nn.one_hot(labels, classes, dtype=bool)
  picked = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
  value = jax.nn.logsumexp(logits, axis=-1) - picked
  return jnp.where((labels >= 0) & (labels < classes), value, jnp.nan)


def cross_entropy(logits: Array, examples: Examples) -> tuple[Array, Array]:
  """Softmax cross-entropy with the integer labels in field `y`.

  Args:
    logits: shape=(batch, classes).
    examples: with `y`, shape=(batch,), integer.
  """
  value = _negative_log_likelihood(logits, examples["y"])
  return value, jnp.ones_like(value)


def classification_metrics(
  logits: Array, examples: Examples
) -> dict[str, Metric]:
  """`loss` and `accuracy` of a classifier; shapes as `cross_entropy`."""
  value, weight = cross_entropy(logits, examples)
  hit = jnp.argmax(logits, axis=-1) == examples["y"]
  return {
    "loss": Metric(value * weight, weight),
    "accuracy": Metric(hit.astype(value.dtype) * weight, weight),
  }


def token_cross_entropy(
  logits: Array, examples: Examples
) -> tuple[Array, Array]:
  """Mean cross-entropy over a sequence's tokens; 0 in `y` is padding.

  Args:
    logits: shape=(batch, time, tokens).
    examples: with `y`, shape=(batch, time), integer.

  Returns:
    The mean over a sequence's tokens, and how many those are.
  """
  values, real = _tokens(logits, examples)
  count = real.sum(-1)
  return values.sum(-1) / jnp.maximum(count, 1), count


def token_metrics(logits: Array, examples: Examples) -> dict[str, Metric]:
  """`loss` and `accuracy` a token; shapes as `token_cross_entropy`."""
  values, real = _tokens(logits, examples)
  hit = (jnp.argmax(logits, axis=-1) == examples["y"]) * real
  count = real.sum(-1)
  return {
    "loss": Metric(values.sum(-1), count),
    "accuracy": Metric(hit.sum(-1), count),
  }


def _tokens(logits: Array, examples: Examples) -> tuple[Array, Array]:
  """Each token's loss, and 1 where it is none of padding; (batch, time)."""
  values = _negative_log_likelihood(logits, examples["y"])
  real = (examples["y"] != 0).astype(values.dtype)
  return values * real, real


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
  metrics: ExampleMetrics = classification_metrics,
  trainable: Any = nnx.Param,
  inputs: Callable[[Examples], Array] = lambda examples: examples["x"],
  check: Callable[[Mapping[str, np.ndarray]], None] = lambda examples: None,
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
    metrics: (outputs, examples) -> name -> `Metric` of per-example values.
    trainable: an nnx filter, e.g. `nnx.LoRAParam`.
    inputs: examples -> the module's argument.
    check: as in `Task`.
    fast_layers: compute convolution and pooling as `fast_layers.py` does; None:
      on a CPU.
  """
  if isinstance(make, nnx.Module):
    raise TypeError(
      f"nnx_task got a {type(make).__name__}; give the function that makes it,"
      f" lambda rngs: {type(make).__name__}(..., rngs=rngs)."
    )
  frozen = nnx.All(nnx.Param, nnx.Not(trainable))
  filters = (trainable, frozen, nnx.RngState, ...)

  def structure(mode: str) -> tuple[nnx.GraphDef[Any], PyTree]:
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    getattr(module, mode)()
    for _, part in nnx.iter_modules(module):
      if (
        isinstance(part, nnx.BatchNorm) and part.promote_dtype is promote_dtype
      ):
        part.promote_dtype = cast(Any, _keep_statistics)
    graphdef, *states = nnx.split(module, *filters)
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
    value, weight = loss(module(inputs(examples)), examples)
    _, *states = nnx.split(module, *filters)
    return Loss(value, weight, states[3])

  def task_logits(variables: Variables, examples: Examples) -> Array:
    module = module_of(evaluating, variables, jax.random.key(0))
    logits: Array = module(inputs(examples))
    return logits

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    return metrics(task_logits(variables, examples), examples)

  task = Task(init, task_loss, task_metrics, check, task_logits)
  return with_fast_layers(task, fast_layers)


def linen_task(
  module: Any,
  example_input: Any,
  *,
  loss: ExampleLoss = cross_entropy,
  metrics: ExampleMetrics = classification_metrics,
  train_argument: str | None = None,
  streams: tuple[str, ...] = ("dropout",),
  inputs: Callable[[Examples], Array] = lambda examples: examples["x"],
  fast_layers: bool | None = None,
) -> Task:
  """A task from a `flax.linen` module.

  Args:
    module: the `nn.Module`.
    example_input: an input batch, or its `jax.ShapeDtypeStruct`.
    loss: as in `nnx_task`.
    metrics: as in `nnx_task`.
    train_argument: name of the module's boolean argument for training mode,
      e.g. "train"; None: it has none.
    streams: names of the random streams it draws from in training.
    inputs: examples -> the module's argument.
    fast_layers: as in `nnx_task`.
  """

  def mode(training: bool) -> dict[str, bool]:
    return {} if train_argument is None else {train_argument: training}

  def init(key: Key) -> Variables:
    x = jnp.zeros(example_input.shape, example_input.dtype)
    collections = dict(module.init(key, x, **mode(False)))
    return Variables(collections.pop("params"), collections)

  def task_loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    outputs, buffers = module.apply(
      {"params": variables.params, **variables.buffers},
      inputs(examples),
      rngs={s: jax.random.fold_in(key, i) for i, s in enumerate(streams)},
      mutable=list(variables.buffers),
      **mode(True),
    )
    return Loss(*loss(outputs, examples), buffers=dict(buffers))

  def task_logits(variables: Variables, examples: Examples) -> Array:
    logits: Array = module.apply(
      {"params": variables.params, **variables.buffers},
      inputs(examples),
      **mode(False),
    )
    return logits

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    return metrics(task_logits(variables, examples), examples)

  task = Task(init, task_loss, task_metrics, logits=task_logits)
  return with_fast_layers(task, fast_layers)


def function_task(
  init: Callable[[Key], PyTree],
  loss: Callable[[PyTree, Examples], Array],
  metrics: Callable[[PyTree, Examples], dict[str, Array]] | None = None,
  *,
  fast_layers: bool | None = None,
) -> Task:
  """A task from a plain pair of functions.

  Args:
    init: key -> params.
    loss: (params, examples) -> the loss of each example, shape=(batch,).
    metrics: (params, examples) -> name -> value of each example; `loss` is
      added where it is missing.
    fast_layers: as in `nnx_task`.
  """

  def task_loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    del key
    value = loss(variables.params, examples)
    return Loss(value, jnp.ones_like(value))

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    values = {"loss": loss(variables.params, examples)}
    if metrics is not None:
      values |= metrics(variables.params, examples)
    return {k: Metric(v, jnp.ones_like(v)) for k, v in values.items()}

  task = Task(lambda key: Variables(init(key)), task_loss, task_metrics)
  return with_fast_layers(task, fast_layers)


def with_metrics(task: Task, functions: Sequence[ExampleMetric]) -> Task:
  """The task with further metrics, each under its function's name.

  Args:
    task: with `Task.logits`.
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
      # The last two are columns of the table of clients.
      if name in (*found, "client", "examples"):
        raise MetricError(
          f"{field}: the name {name!r} is taken; rename the function."
        )
      found[name] = _as_metric(name, function, outputs, examples)
    return found

  return task._replace(metrics=metrics, higher_is_better=directions)


def _as_metric(
  name: str, function: ExampleMetric, outputs: PyTree, examples: Examples
) -> Metric:
  """What a function says of a batch, in float32 at least."""
  try:
    said = function(outputs, examples)
    if not isinstance(said, Metric):
      value = jnp.asarray(said)
      said = Metric(value, jnp.ones(value.shape, jnp.float32))
    said = jax.tree.map(lambda x: _float32(jnp.asarray(x)), said)
  except Exception as error:
    code = getattr(function, "__code__", None)
    text = references.raised(code and code.co_filename, error)
    raise MetricError(f"model.metrics: {name!r}: {text}") from error
  batch = (len(next(iter(examples.values()))),)
  for array in said:
    if array.shape != batch:
      raise MetricError(
        f"model.metrics: {name!r} has shape {array.shape}; give one number an"
        f" example, shape {batch}."
      )
  return said


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
    return Loss(_float32(value), _float32(weight), buffers)

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    return jax.tree.map(
      _float32, task.metrics(lower(variables), inputs(examples))
    )

  def logits(variables: Variables, examples: Examples) -> Array:
    assert task.logits is not None
    return _float32(task.logits(lower(variables), inputs(examples)))

  task_logits = None if task.logits is None else logits
  return task._replace(loss=loss, metrics=metrics, logits=task_logits)


def with_remat(task: Task) -> Task:
  """The task with its activations recomputed in the backward pass."""
  logits = None if task.logits is None else jax.checkpoint(task.logits)
  return task._replace(loss=jax.checkpoint(task.loss), logits=logits)
