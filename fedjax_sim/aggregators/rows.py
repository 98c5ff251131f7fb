"""Rows of a stack that is dealt over devices by coordinates.

What robust aggregators need of rows as a whole: their norms, the distances
between them, and means of some of them. Sums over coordinates come from
`AggregationContext.shares`, so every device computes the same from its share.

All is computed in float32 or wider. Rows of absent clients may hold anything;
finite rows however large give no NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.aggregators.stacked import empty_stack, filled_rows, put_wave
from fedjax_sim.core import AggregationContext, Array, PyTree, Shares, validate
from fedjax_sim.core.tree import accumulator_dtype, inverse_power

FARTHEST = 2.0**40  # in units of the median row's largest number


def empty_rows(update: PyTree, capacity: int) -> PyTree:
  """Return a stack as `empty_stack` does, and a weight for every row.

  Returns:
    (stack, filled, weights): leaves (capacity, ...); shape=(capacity,), bool;
    shape=(capacity,), float32.
  """
  return *empty_stack(update, capacity), jnp.zeros((capacity,), jnp.float32)


def put_rows(
  acc: PyTree,
  updates: PyTree,
  weights: Array,
  present: Array,
  context: AggregationContext,
) -> PyTree:
  """Write a wave's updates and weights into their rows."""
  *rows, old = acc
  rows = put_wave(tuple(rows), updates, weights, present, context)
  own = jnp.where(present, weights, 0).astype(old.dtype)
  return *rows, lax.dynamic_update_slice_in_dim(old, own, context.slot, 0)


def matrices(stack: PyTree, filled: Array) -> PyTree:
  """Return the stack in float32 or wider, 0 in rows that are not filled."""
  wide = lambda s: filled_rows(filled, s.astype(accumulator_dtype(s)), 0)
  return jax.tree.map(wide, stack)


def norms(rows: PyTree, shares: Shares) -> Array:
  """Return the L2 norm of every row, without overflow of squares.

  Args:
    rows: leaves (rows, ...), as `matrices` returns them.
    shares: how the coordinates are dealt.

  Returns:
    shape=(rows,); infinite if out of range. The derivative at 0 is 0.
  """
  inverse = inverse_power(_largest(rows, shares))
  total = jnp.zeros(len(inverse), inverse.dtype)
  for leaf in jax.tree.leaves(rows):
    flat = leaf.reshape(len(leaf), -1) * inverse[:, None]
    square = jnp.sum(flat**2, axis=1)
    total += shares.part(square) if leaf.ndim == 1 else square
  total = shares.sum(total)
  positive = total > 0
  root = jnp.sqrt(jnp.where(positive, total, 1)) / inverse
  return jnp.where(positive, root, 0)


def squared_distances(rows: PyTree, filled: Array, shares: Shares) -> Array:
  """Return the squared L2 distances between rows, up to a common factor.

  They come from a Gram matrix, which is two matrix products, of rows less one
  of them, the one whose median distance from the others is the smallest: what
  the rows have in common would cost digits. The unit is near the largest
  number of the median row. Numbers beyond `FARTHEST` units count as that.

  Args:
    rows: leaves (rows, ...), as `matrices` returns them.
    filled: shape=(rows,), bool.
    shares: how the coordinates are dealt.

  Returns:
    shape=(rows, rows); infinite where a row is not filled. No derivative.
  """
  gram = centered_gram(rows, filled, shares)
  return _distances(gram, filled)


def centered_gram(rows: PyTree, filled: Array, shares: Shares) -> Array:
  """Return the Gram matrix of `squared_distances`, shape=(rows, rows)."""
  rows = lax.stop_gradient(rows)
  largest = _largest(rows, shares)
  inverse = inverse_power(lower_median(largest, filled & (largest > 0)))
  unit = lambda s: jnp.clip(s * inverse, -FARTHEST, FARTHEST)
  near_one = jax.tree.map(unit, rows)
  distances = _distances(gram(near_one, shares), filled)
  medians = jax.vmap(lower_median, (0, None))(distances, filled)
  center = jnp.argmin(jnp.where(filled, medians, jnp.inf))
  less = lambda s: filled_rows(filled, s - s[center][None], 0)
  return gram(jax.tree.map(less, near_one), shares)


def gram(rows: PyTree, shares: Shares) -> Array:
  """Return the inner products of all pairs of rows, shape=(rows, rows)."""
  total = jnp.zeros((), jnp.float32)
  for leaf in jax.tree.leaves(rows):
    flat = leaf.reshape(len(leaf), -1)
    # By default, devices may take factors of less than float32.
    product = jnp.matmul(flat, flat.T, precision=lax.Precision.HIGHEST)
    total += shares.part(product) if leaf.ndim == 1 else product
  return shares.sum(total)


def _distances(gram: Array, filled: Array) -> Array:
  square = jnp.diagonal(gram)
  distances = jnp.maximum(square[:, None] + square[None] - 2 * gram, 0)
  distances = jnp.where(jnp.eye(len(gram), dtype=bool), 0, distances)
  return jnp.where(filled[:, None] & filled[None], distances, jnp.inf)


def _largest(rows: PyTree, shares: Shares) -> Array:
  """Return the largest magnitude of each row, shape=(rows,)."""
  leaves = jax.tree.leaves(rows)
  of = lambda s: jnp.max(jnp.abs(s.reshape(len(s), -1)), axis=1, initial=0)
  largest = jnp.zeros((), jnp.float32)
  for leaf in leaves:
    largest = jnp.maximum(largest, of(leaf))
  return shares.max(largest)


def lower_median(values: Array, counted: Array) -> Array:
  """Return the lower median of some numbers, 0 if there are none.

  Args:
    values: shape=(n,), floats.
    counted: shape=(n,), bool; which ones count.
  """
  count = jnp.sum(counted)
  ordered = jnp.sort(jnp.where(counted, values, jnp.inf))
  return jnp.where(count > 0, ordered[jnp.maximum(count - 1, 0) // 2], 0)


def lowest(scores: Array, number: Array, filled: Array, rank: Array) -> Array:
  """Return which rows have the lowest scores; of equal ones the lowest rank.

  Args:
    scores: shape=(rows,), floats.
    number: shape=(), int; how many, at most.
    filled: shape=(rows,), bool; others are never chosen.
    rank: shape=(rows,), int; clients' ranks, which depend on no layout.

  Returns:
    shape=(rows,), bool.
  """
  order = jnp.lexsort((rank, scores, ~filled))
  place = jnp.argsort(order)
  return filled & (place < number)


def mean_of(rows: PyTree, weights: Array) -> PyTree:
  """Return the weighted mean of rows, 0 if no weight is left.

  Rows of weight 0 add exactly nothing.

  Args:
    rows: leaves (rows, ...), as `matrices` returns them.
    weights: shape=(rows,), >= 0.
  """
  total = jnp.sum(weights)
  shares = weights / jnp.where(total > 0, total, 1)

  def mean(s: Array) -> Array:
    factor = shares.reshape((-1,) + (1,) * (s.ndim - 1)).astype(s.dtype)
    return jnp.sum(jnp.where(factor > 0, s, 0) * factor, axis=0)

  return jax.tree.map(mean, rows)


def attackers(f: int | None) -> dict[str, float]:
  """Return the hyper-parameters of an aggregator that takes `f`.

  Args:
    f: how many attackers it is to withstand; None for as many as it can.

  Raises:
    TypeError, ValueError: f is no whole number >= 0.
  """
  return {} if f is None else {"f": float(validate.integer("f", f, ge=0))}


def tolerated(
  context: AggregationContext, count: Array, slope: int, offset: int
) -> Array:
  """Return how many attackers an aggregator withstands in a round.

  The number that was asked for, or as many as the present clients allow, if
  these are fewer: such f that count >= slope * f + offset.

  Args:
    context: whose hyper-parameters are those of `attackers`.
    count: shape=(), int32; clients that are present.
    slope: clients that an attacker takes.
    offset: clients that it takes without attackers.

  Returns:
    shape=(), int32.
  """
  most = jnp.maximum(count - offset, 0) // slope
  if "f" not in context.hparams:
    return most
  wanted = jnp.round(context.hparams["f"]).astype(most.dtype)
  return jnp.minimum(wanted, most)
