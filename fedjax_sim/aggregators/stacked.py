"""Aggregators that keep every client's update, as robust statistics need."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import AggregationContext, Aggregator, Array, PyTree
from fedjax_sim.core.tree import accumulator_dtype


def empty_stack(update: PyTree, capacity: int) -> PyTree:
  """Return (stack, leaves (capacity, ...); filled, shape=(capacity,), bool)."""
  stack = jax.tree.map(
    lambda x: jnp.zeros((capacity, *x.shape), x.dtype), update
  )
  return stack, jnp.zeros((capacity,), bool)


def put_wave(
  acc: PyTree,
  updates: PyTree,
  weights: Array,
  present: Array,
  context: AggregationContext,
) -> PyTree:
  """Write a wave's updates into the stack, absent clients' rows included."""
  del weights
  stack, filled = acc
  write = lambda s, u: lax.dynamic_update_slice_in_dim(s, u, context.slot, 0)
  return jax.tree.map(write, stack, updates), write(filled, present)


def filled_rows(filled: Array, s: Array, other: float) -> Array:
  """Return a stacked leaf with `other` in the rows that are not filled."""
  return jnp.where(filled.reshape((-1,) + (1,) * (s.ndim - 1)), s, other)


def median() -> Aggregator:
  """Return the coordinate-wise median (Yin et al. 2018, arXiv 1803.01498).

  Robust to fewer than half of the clients; ignores weights. Keeps every
  client's update: memory is cohort x parameters.
  """

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight, context
    stack, filled = acc

    def middle(s: Array) -> Array:
      # Absent rows sort to the end; the two middle ranks of the rest follow.
      s = jnp.sort(filled_rows(filled, s, jnp.inf), axis=0)
      last = jnp.maximum(count - 1, 0)
      low = lax.dynamic_index_in_dim(s, last // 2, 0, keepdims=False)
      high = lax.dynamic_index_in_dim(s, (last + 1) // 2, 0, keepdims=False)
      wide = accumulator_dtype(s)
      # Halves, as a sum could overflow; exact but for subnormal numbers.
      both = low.astype(wide) / 2 + high.astype(wide) / 2
      return jnp.where(count > 0, both, 0)

    return jax.tree.map(middle, stack)

  return Aggregator(
    empty_stack,
    put_wave,
    finish,
    needs_all_updates=True,
    coordinatewise=True,
  )


def stack() -> Aggregator:
  """Return the stack of all updates, for algorithms that reduce it.

  Keeps every client's update: memory is cohort x parameters, over all
  devices. Rows that are not filled are 0.
  """

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight, count, context
    updates, filled = acc
    return jax.tree.map(lambda s: filled_rows(filled, s, 0), updates)

  return Aggregator(
    empty_stack, put_wave, finish, needs_all_updates=True, reduces=False
  )
