"""Trace a function once, though a program needs its shapes and then its work.

An accumulator has to exist before the loop that fills it, so the shapes of what
a step returns are asked for first, which traces it: a client's training, or a
whole round. Tracing is Python, and takes as long as compiling a small model.
Constants that a trace finds can be arguments of the program, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from fedjax_sim.core import PyTree

T = TypeVar("T")

# Without any optimization (0) floats are rounded in other ways.
_QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}


def trace_once(function: Callable[..., T]) -> Callable[..., T]:
  """Return a function whose calls with the same shapes share one trace.

  The program is that of the function itself: its operations are inlined.

  Args:
    function: arrays -> arrays; it may use tracers from around it.
  """
  traced: Callable[..., T] = jax.jit(function, inline=True)
  return traced


def jitted_once(
  function: Callable[..., Any], like: tuple[Any, ...], where: PyTree
) -> Callable[..., Any]:
  """Return a compiled function that is called once; its constants are given.

  XLA would compile large ones, such as weights to begin from, into it: 400 MB
  took 52 s, and take 2 s as arguments. On a CPU it is compiled with fewer of
  LLVM's optimizations: the draws of a model take a quarter of the time to
  compile, have the same bits, and run as fast within a factor of two. Sums have
  another order, so they may be rounded otherwise.

  Args:
    function: a pure function of arrays.
    like: arguments of the shapes that it is called with.
    where: shardings of what it returns.
  """
  constants, call = with_constants(function, like)
  fewest = jax.config.values["jax_disable_most_optimizations"]
  quick = jax.default_backend() == "cpu" and not fewest
  options = _QUICK if quick else {}
  compiled = jax.jit(call, out_shardings=where, compiler_options=options)
  return lambda *given: compiled(constants, *given)


def with_constants(
  function: Callable[..., Any], like: tuple[Any, ...]
) -> tuple[list[Any], Callable[..., Any]]:
  """Return a function's constants, and the function that takes them first.

  Args:
    function: a pure function of arrays.
    like: arguments of the shapes that it is called with.
  """
  trace = jax.make_jaxpr(function, return_shape=True)
  program, shapes = trace(*like)
  structure = jax.tree.structure(shapes)
  constants = [
    x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)
    for x in program.consts
  ]

  def call(constants: list[Any], *given: Any) -> PyTree:
    leaves = jax.tree.leaves(given)
    found = jaxpr_as_fun(program.replace(consts=constants))(*leaves)
    return jax.tree.unflatten(structure, found)

  return constants, call
