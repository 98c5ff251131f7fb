"""Layers of any model, in the forms that are fast here.

A function is traced, and in its program XLA's convolutions, windows and dense
layers with few outputs are replaced by `convolution.py`, `pooling.py` and
`dense.py`, wherever they are: in loops, in branches, under rematerialization.
Values, gradients, dtypes and the names of scopes stay what they are, up to
rounding; all else is left as it is. A function with a derivative of its own
keeps that derivative, as it was written.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax
import jax
from jax.extend import core
from jax.extend.core import primitives

from fedjax_sim.core import Task, validate
from fedjax_sim.tasks import convolution, dense, pooling

F = TypeVar("F", bound=Callable[..., Any])

MOST_PARTS = 64  # of a window of pooling, over all dimensions


def with_fast_layers(task: Task, wanted: bool | None = None) -> Task:
  """Return the task with its layers in their fast forms.

  Args:
    task: the task; its `init` is left alone.
    wanted: whether to do so; None: on a CPU, where XLA's own are slow.
  """
  if wanted is None:
    wanted = jax.default_backend() == "cpu"
  if not validate.boolean("fast_layers", wanted):
    return task
  return task._replace(
    loss=fast(task.loss),
    metrics=fast(task.metrics),
    logits=task.logits and fast(task.logits),
    features=task.features and fast(task.features),
  )


_WRITTEN = contextvars.ContextVar("written", default=False)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
  """Call functions as they are written meanwhile, with arrays with values."""
  token = _WRITTEN.set(True)
  try:
    yield
  finally:
    _WRITTEN.reset(token)


def fast(function: F) -> F:
  """Return a pure function of arrays with its layers in their fast forms."""

  @functools.wraps(function)
  def faster(*arguments: Any, **named: Any) -> Any:
    if _WRITTEN.get():
      return function(*arguments, **named)
    # A function of its own: JAX would remember what this one closes over.
    trace = jax.make_jaxpr(lambda a, n: function(*a, **n), return_shape=True)
    program, outputs = trace(arguments, named)
    changed = _changed(program)
    if changed is program:
      return function(*arguments, **named)
    leaves = core.jaxpr_as_fun(changed)(*jax.tree.leaves((arguments, named)))
    return jax.tree.unflatten(jax.tree.structure(outputs), leaves)

  return faster  # type: ignore[return-value]


# --- the program that is replaced ---------------------------------------------


def _changed(part: Any) -> Any:
  """Return an equation's parameter, itself where nothing in it is replaced."""
  if isinstance(part, core.ClosedJaxpr):
    inner = _changed(part.jaxpr)
    return part if inner is part.jaxpr else part.replace(jaxpr=inner)
  if isinstance(part, core.Jaxpr):
    equations = [_equation(e) for e in part.eqns]
    same = all(a is b for a, b in zip(equations, part.eqns, strict=True))
    return part if same else part.replace(eqns=equations)
  if isinstance(part, tuple):
    parts = tuple(map(_changed, part))
    same = all(a is b for a, b in zip(parts, part, strict=True))
    return part if same else parts
  return part


def _equation(equation: Any) -> Any:
  """Return an equation with fast layers, or itself if it has none."""
  form = _form(equation)
  if form is not None:
    return _replaced(equation, form)
  params = {name: _changed(value) for name, value in equation.params.items()}
  if all(params[name] is value for name, value in equation.params.items()):
    return equation
  return equation.replace(params=params)


def _form(equation: Any) -> Callable[..., jax.Array] | None:
  """Return the function that computes the same fast; None if there is none."""
  params = equation.params
  if equation.primitive is primitives.conv_general_dilated_p:
    return functools.partial(_CONVOLVE, **params)
  if equation.primitive is primitives.dot_general_p:
    return _dense_form(equation)
  pool = _POOLS.get(equation.primitive)
  parts = sum(size for size in params.get("window_dimensions", ()) if size > 1)
  if pool is None or parts > MOST_PARTS or set(params["base_dilation"]) != {1}:
    return None
  return functools.partial(
    pool,
    window=params["window_dimensions"],
    strides=params["window_strides"],
    padding=params["padding"],
    dilation=params["window_dilation"],
  )


def _dense_form(equation: Any) -> Callable[..., jax.Array] | None:
  """Return the form of a product; None if it is no narrow dense layer."""
  params = dict(equation.params)
  x, kernel = (v.aval for v in equation.invars)
  sharded = params.pop("out_sharding") is not None
  # An algorithm has parts for either side, which would have to change places.
  special = sharded or isinstance(params["precision"], jax.lax.DotAlgorithm)
  if special or not dense.is_dense(x, kernel, params.pop("dimension_numbers")):
    return None
  return functools.partial(_DENSE, **params)


def _jitted(function: Callable[..., jax.Array], arrays: int) -> Any:
  """Jit a form, so that it is traced, and outside loops compiled, only once."""
  names = list(inspect.signature(function).parameters)
  return jax.jit(function, static_argnames=names[arrays:])


_CONVOLVE = _jitted(convolution.convolve, 2)
_DENSE = _jitted(dense.dense, 2)
_POOLS = {
  primitives.reduce_window_max_p: _jitted(pooling.maximum, 1),
  primitives.reduce_window_min_p: _jitted(pooling.minimum, 1),
  primitives.reduce_window_sum_p: _jitted(pooling.total, 1),
}


def _replaced(equation: Any, form: Callable[..., jax.Array]) -> Any:
  """Return a call of the form that replaces an equation, or the equation.

  The equation stays where the form itself leaves it to XLA.
  """
  shapes = [
    jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars
  ]
  (call,) = jax.make_jaxpr(form)(*shapes).eqns
  left = any(e.primitive is equation.primitive for e in _equations(call))
  if left and equation.primitive in _SLOW:
    return equation
  return call.replace(
    invars=equation.invars,
    outvars=equation.outvars,
    source_info=equation.source_info,
    ctx=equation.ctx,
  )


# --- what stays slow ----------------------------------------------------------

_SLOW = {
  primitives.conv_general_dilated_p: "convolution",
  primitives.reduce_window_p: "pooling",
  primitives.select_and_scatter_add_p: "the gradient of pooling",
  **dict.fromkeys(_POOLS, "pooling"),
}


def slow_layers(
  function: Callable[..., Any], *arguments: Any, **named: Any
) -> list[str]:
  """Return the layers that a function leaves to XLA, each in words.

  Args:
    function: a pure function of arrays.
    *arguments: its arguments, or their shapes.
    **named: its named arguments, likewise.
  """
  program = jax.make_jaxpr(function)(*arguments, **named)
  return [
    _told(equation)
    for equation in _equations(program.jaxpr)
    if equation.primitive in _SLOW
  ]


def _equations(part: Any) -> Iterator[Any]:
  """Yield all equations of a program, those inside others too."""
  if isinstance(part, core.ClosedJaxpr):
    part = part.jaxpr
  if isinstance(part, core.Jaxpr):
    inside: Any = part.eqns
  elif isinstance(part, core.JaxprEqn):
    yield part
    inside = part.params.values()
  else:
    inside = part if isinstance(part, tuple) else ()
  for other in inside:
    yield from _equations(other)


_PACKAGES = (
  *(str(pathlib.Path(file).parent) for file in (jax.__file__, flax.__file__)),
  str(pathlib.Path(__file__).parents[1]),  # fedjax_sim
)


def _told(equation: Any) -> str:
  """Return what an equation computes and the line of code it comes from."""
  shapes = [str(x.aval.shape) for x in equation.invars]
  if "window_dimensions" in equation.params:
    shapes.append(str(equation.params["window_dimensions"]))
  text = f"{_SLOW[equation.primitive]} of {' by '.join(shapes)}"
  trace = equation.source_info.traceback
  for frame in trace.frames if trace else ():
    if not frame.file_name.startswith(_PACKAGES):
      return f"{text} ({pathlib.Path(frame.file_name).name}:{frame.line_num})"
  return text
