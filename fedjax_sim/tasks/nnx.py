"""Tasks from Flax nnx modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  PyTree,
  Task,
  Variables,
)
from fedjax_sim.tasks import losses
from fedjax_sim.tasks.fast_layers import with_fast_layers
from fedjax_sim.tasks.losses import ExampleLoss, ExampleMetrics, cross_entropy

Check = Callable[[Mapping[str, np.ndarray]], None]  # see `Task.check`
Inputs = Callable[[Examples], Array]

# What nnx does to the arguments of a batch norm unless it is given another.
PROMOTE_DTYPE = (
  inspect.signature(nnx.BatchNorm.__init__).parameters["promote_dtype"].default
)


def _keep_statistics(args: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
  """Promote (x, mean, var, scale, bias) of a batch norm, but not mean and var.

  By default nnx promotes all five, so with running statistics in float32
  whatever follows the layer would be computed in float32, too.
  """
  x, mean, var, *affine = args
  x, *affine = PROMOTE_DTYPE((x, *affine), **options)
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
  """Make a task from a `flax.nnx` module.

  Variables that `trainable` selects are trained; other parameters are frozen;
  what is neither, such as batch statistics, are buffers. Random streams
  (dropout and others) are seeded anew with every step's key. A module's method
  `features`, if it has one, is `Task.features`: what `__call__` computes before
  its last layer, of the same argument.

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

  def structure(mode: str) -> tuple[nnx.GraphDef[Any], PyTree, bool]:
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    getattr(module, mode)()
    for _, part in nnx.iter_modules(module):
      if (
        isinstance(part, nnx.BatchNorm) and part.promote_dtype is PROMOTE_DTYPE
      ):
        part.promote_dtype = cast(Any, _keep_statistics)
    graphdef, *states = nnx.split(module, *filters)
    _check_trained(trainable, *states[:2])
    return graphdef, states[2], tells_features(type(module))

  training, rng_shapes, has_features = structure("train")
  evaluating, _, _ = structure("eval")
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

  def task_features(variables: Variables, examples: Examples) -> Array:
    module = module_of(evaluating, variables, jax.random.key(0))
    features: Array = module.features(inputs(examples))
    return features

  def task_metrics(
    variables: Variables, examples: Examples
  ) -> dict[str, Metric]:
    return evaluate(task_logits(variables, examples), examples)

  task = Task(
    *(init, task_loss, task_metrics, check, task_logits),
    features=task_features if has_features else None,
  )
  return with_fast_layers(task, fast_layers)


def tells_features(kind: type) -> bool:
  """Return whether a class of modules has a method `features`."""
  return inspect.isfunction(getattr(kind, "features", None))


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
