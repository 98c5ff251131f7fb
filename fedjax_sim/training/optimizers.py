"""Optimizers whose numbers are hyper-parameters: any of optax, built in trace.

An `Optimizer` keeps its numeric arguments apart from the function that makes
the `optax.GradientTransformation`, so that the engine can pass them in traced:
a schedule, a sweep or a decay on a plateau then recompiles nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_sim.core import PyTree, validate
from fedjax_sim.core.tree import paths_of
from fedjax_sim.tasks import freezing
from fedjax_sim.training.lamb import uncorrected_lamb

Factory = Callable[..., optax.GradientTransformation]


def with_l2(factory: Factory) -> Factory:
  """Return the factory with one more argument, `weight_decay`.

  Before the optimizer sees a gradient, `weight_decay` times the parameters is
  added to it: the gradient of `weight_decay / 2 * |params|^2`. That is what
  torch's optimizers of these names do; of adamw and its like, decay is a part
  of the step instead.

  Args:
    factory: one of optax's without an argument of that name.
  """

  @functools.wraps(factory)
  def make(
    *arguments: Any, weight_decay: float | None = None, **named: Any
  ) -> optax.GradientTransformation:
    inner = factory(*arguments, **named)
    if weight_decay is None:
      return inner
    return optax.chain(optax.add_decayed_weights(weight_decay), inner)

  signature = inspect.signature(factory)
  decay = inspect.signature(make, follow_wrapped=False).parameters[
    "weight_decay"
  ]
  parameters = [*signature.parameters.values(), decay]
  make.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
  return make


OPTIMIZERS: dict[str, Factory] = {
  "adabelief": with_l2(optax.adabelief),
  "adagrad": with_l2(optax.adagrad),
  "adam": with_l2(optax.adam),
  "adamax": with_l2(optax.adamax),
  "adamw": optax.adamw,
  "lamb": optax.lamb,
  "lars": optax.lars,
  "lion": optax.lion,
  "radam": with_l2(optax.radam),
  "rmsprop": with_l2(optax.rmsprop),
  "sgd": with_l2(optax.sgd),
  "uncorrected_lamb": uncorrected_lamb,
  "yogi": with_l2(optax.yogi),
}


class Optimizer(NamedTuple):
  """An optimizer and its default numeric hyper-parameters.

  Attributes:
    build: hyper-parameters -> `optax.GradientTransformation`; called inside
      the trace.
    hparams: name -> float, such as the learning rate.
    is_sgd: whether a step is minus the learning rate times the gradient, to
      which momentum, decay or clipping may be added, and nothing else.
  """

  build: Callable[[Mapping[str, Any]], optax.GradientTransformation]
  hparams: dict[str, float]
  is_sgd: bool = False


def optimizer(
  kind: str | Callable[..., optax.GradientTransformation],
  **arguments: Any,
) -> Optimizer:
  """Return an optimizer by name, or from any function that makes one.

  Args:
    kind: a name in `OPTIMIZERS`, or a function such as `optax.sgd`.
    **arguments: its arguments. Floats become traced hyper-parameters; bools,
      ints, strings and functions, such as a schedule, stay Python constants.

  Raises:
    UnknownNameError: no such optimizer, or no such argument.
    TypeError, ValueError: a learning rate that is no number >= 0, or an
      argument that is missing.
  """
  factory = (
    validate.lookup("optimizer", kind, OPTIMIZERS)
    if isinstance(kind, str)
    else kind
  )
  name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
  validate.arguments(f"optimizer {name}".strip(), arguments, factory)
  rate = arguments.get("learning_rate", 0)
  if "learning_rate" in arguments and not callable(rate):  # a schedule is
    arguments["learning_rate"] = validate.number("learning_rate", rate, ge=0.0)
  numeric = {
    k: float(v)
    for k, v in arguments.items()
    if isinstance(v, float | np.floating)
  }
  static = {k: v for k, v in arguments.items() if k not in numeric}

  def build(hparams: Mapping[str, Any]) -> optax.GradientTransformation:
    return factory(**static, **hparams)

  plain = any(factory is sgd for sgd in (OPTIMIZERS["sgd"], optax.sgd))
  return Optimizer(build, numeric, is_sgd=plain and not any(static.values()))


def clipped(inner: Optimizer, norm: float, field: str = "norm") -> Optimizer:
  """Return the optimizer with gradients clipped to a global L2 norm.

  Args:
    inner: the optimizer.
    norm: longer gradients are scaled down to it; the hyper-parameter
      `max_grad_norm`.
    field: what messages call it.

  Raises:
    TypeError, ValueError: no positive number.
  """
  norm = validate.number(field, norm, gt=0)

  def build(hparams: Mapping[str, Any]) -> optax.GradientTransformation:
    rest = {k: v for k, v in hparams.items() if k != "max_grad_norm"}
    return optax.chain(
      optax.clip_by_global_norm(hparams["max_grad_norm"]), inner.build(rest)
    )

  return inner._replace(
    build=build, hparams={**inner.hparams, "max_grad_norm": norm}
  )


def by_layer(
  inner: Optimizer,
  rates: Sequence[tuple[str, float]],
  params: PyTree,
  field: str = "layer_rates",
) -> Optimizer:
  """Return the optimizer with other rates for some parameters.

  Args:
    inner: the optimizer.
    rates: (pattern, factor): a parameter whose path the pattern matches, see
      `tasks/freezing.py`, takes steps times the factor; the first pattern
      counts.
    params: the parameters, or their shapes.
    field: what messages call the rates.

  Raises:
    TypeError, ValueError: they are no such pairs, a factor is negative, or a
      pattern is no regular expression or matches no parameter.
  """
  if not isinstance(rates, list | tuple) or not all(
    isinstance(pair, list | tuple) and len(pair) == 2 for pair in rates
  ):
    raise TypeError(
      f"{field}={rates!r} holds no pairs; give (pattern, factor) each, such as"
      " (('layers/0/', 0.1),)."
    )
  freezing.matching(field, [pattern for pattern, _ in rates], params)
  factors: dict[str, float] = {}
  for pattern, factor in rates:
    factor = validate.number(f"{field}: factor of {pattern!r}", factor, ge=0)
    hits = freezing.matching(field, (pattern,), params)
    for path, hit in zip(paths_of(params), hits, strict=True):
      if hit:
        factors.setdefault(path, factor)

  def scale(updates: PyTree, params: PyTree) -> PyTree:
    del params
    leaves, treedef = jax.tree.flatten(updates)
    # By path, as an algorithm may train some of the parameters alone.
    scaled = [
      u * factors[path] if path in factors else u
      for u, path in zip(leaves, paths_of(updates), strict=True)
    ]
    return jax.tree.unflatten(treedef, scaled)

  def build(hparams: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.chain(inner.build(hparams), optax.stateless(scale))

  return Optimizer(build, inner.hparams)


def check(field: str, value: Optimizer) -> Optimizer:
  """Return `value`, if it is an `Optimizer`.

  Raises:
    TypeError: it is something else, such as optax's own transformation.
  """
  example = 'optimizer("sgd", learning_rate=0.1)'
  validate.instance(field, value, Optimizer, example)
  return value


def check_sgd(field: str, value: Optimizer, *allowed: str) -> Optimizer:
  """Return `value`, if it is SGD.

  Args:
    field: how messages name it.
    value: an optimizer.
    *allowed: hyper-parameters besides the learning rate, such as `momentum`.

  Raises:
    TypeError: it is no `Optimizer`.
    ValueError: it is another optimizer, or SGD with Nesterov's momentum, rates
      by layer or hyper-parameters that are not allowed.
  """
  check(field, value)
  others = sorted(set(value.hparams) - {"learning_rate", *allowed})
  if not value.is_sgd or "learning_rate" not in value.hparams or others:
    found = ", ".join(value.hparams) or "none"
    raise ValueError(
      f"{field} is not plain sgd (its hyper-parameters: {found}), which the"
      " algorithm is made for; give sgd with a learning_rate"
      + (f", and perhaps {' or '.join(allowed)}," if allowed else ",")
      + " without nesterov and layer_rates."
    )
  return value


def descend(
  transformation: optax.GradientTransformation,
  gradient: PyTree,
  state: PyTree,
  params: PyTree,
) -> tuple[PyTree, PyTree]:
  """Take one optimizer step.

  Returns:
    (params, state), both new, in the dtypes that they had. Traced numbers may
    be wider than the parameters, and would widen the state with every moment.
  """
  updates, new = transformation.update(gradient, state, params)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  if shapes(updates) != shapes(params):  # it would be broadcast
    raise ValueError(
      f"The optimizer's update has the shapes {shapes(updates)}; let it have"
      f" the parameters', {shapes(params)}."
    )
  new = jax.tree.map(
    lambda n, s: n if n.dtype == s.dtype else n.astype(s.dtype), new, state
  )
  return optax.apply_updates(params, updates), new
