"""Loops with a traced trip count, and their form that reverse mode can pass.

A loop whose trip count is an array runs as often as it says, so nothing
recompiles; but reverse mode must keep what each iteration computed, and cannot
make room for a number that it does not know. Where the host knows the largest
number, a `FixedLoop` scans over as many iterations, and those beyond the count
keep the carry.

An iteration that is not needed must not spoil the derivative either. Under
`vmap` it is computed and thrown away, and 0, the derivative of what is thrown
away, times infinity would be NaN. So whatever goes into it passes `guarded`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Array, PyTree

T = TypeVar("T")


class FixedLoop(NamedTuple):
  """A loop whose length is a constant of the program.

  Attributes:
    length: number of iterations; those beyond the trip count do nothing.
    rematerialize: whether reverse mode keeps the carries alone and computes
      every iteration once more, instead of keeping all that it computed.
  """

  length: int
  rematerialize: bool = True


def guarded(active: Array, tree: T) -> T:
  """Return the tree; if not active, without derivatives of what follows.

  Args:
    active: shape=(), bool.
    tree: arrays. Those that are no floats are returned as they are.
  """

  def guard(x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      return x
    return jnp.where(active, x, lax.stop_gradient(x))

  guarded_tree: T = jax.tree.map(guard, tree)
  return guarded_tree


def repeat(
  count: Array,
  body: Callable[[Array, PyTree, PyTree], PyTree],
  carry: PyTree,
  inputs: PyTree = (),
  fixed: FixedLoop | None = None,
) -> PyTree:
  """Return the carry after `count` iterations.

  Args:
    count: shape=(), int32; the trip count.
    body: (iteration, carry, inputs) -> carry. What it reads besides must not
      depend on what is differentiated if lanes have other trip counts.
    carry: the first carry.
    inputs: arrays that every iteration reads.
    fixed: the form that reverse mode can pass; None for the other.
  """
  if fixed is None and jax.default_backend() == "cpu":
    return lax.fori_loop(0, count, lambda i, c: body(i, c, inputs), carry)
  if fixed is None:
    return _announced(count, lambda i, c: body(i, c, inputs), carry)
  return repeat_while(lambda i, _: i < count, body, carry, inputs, fixed)


def _announced(
  count: Array, body: Callable[[Array, PyTree], PyTree], carry: PyTree
) -> PyTree:
  """Return the carry after `count` iterations, each told that it runs.

  The carry holds whether there is one more iteration. XLA for GPUs selects by
  an array of truth values where a product ends, but does not compare there:
  else every parameter of every lane is written, read and written once more.
  """

  def advance(state: tuple[Array, Array, PyTree]) -> Any:
    _, i, carry = state
    return i + 1 < count, i + 1, body(i, carry)

  first = jnp.zeros_like(count)
  return lax.while_loop(
    lambda state: state[0], advance, (first < count, first, carry)
  )[2]


def repeat_while(
  more: Callable[[Array, PyTree], Array],
  body: Callable[[Array, PyTree, PyTree], PyTree],
  carry: PyTree,
  inputs: PyTree,
  fixed: FixedLoop,
) -> PyTree:
  """Return the carry as it is when a condition does not hold any more.

  Args:
    more: (iteration, carry) -> shape=(), bool. Once False, it stays so.
    body: as in `repeat`.
    carry: the first carry.
    inputs: as in `repeat`.
    fixed: the loop's length, at least as long as the condition can hold.
  """

  def iteration(carry: PyTree, i: Array) -> tuple[PyTree, None]:
    active = more(i, carry)
    # A branch on its own, where there is no vmap, spares the computation.
    after = lax.cond(
      active,
      lambda given, old: body(i, *given),
      lambda given, old: old,
      guarded(active, (carry, inputs)),
      carry,
    )
    return after, None

  if fixed.rematerialize:
    iteration = jax.checkpoint(iteration, prevent_cse=False)
  return lax.scan(iteration, carry, jnp.arange(fixed.length, dtype=jnp.int32))[
    0
  ]
