"""Centered clipping: a mean of clipped deviations from the last aggregate.

Karimireddy et al. 2021, "Learning from history for Byzantine robust
optimization" (arXiv 2012.10333): v_t = v_(t-1) + mean_i of (x_i - v_(t-1))
min(1, tau / ||x_i - v_(t-1)||), one iteration a round, as their experiments
take.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  PyTree,
  validate,
)
from fedjax_sim.core.tree import (
  add_weighted,
  bounded,
  divide,
  zeros_accumulator,
)


def centered_clipping(radius: float = 10.0) -> Aggregator:
  """Return the last aggregate, moved by a mean of clipped deviations.

  f of n attackers move it by f / n of the radius at most in a round, for
  f < n / 2; the paper's guarantee needs f < n / 10. Assumes that honest updates
  change slowly from round to round, as with momentum on the clients. Weights
  count nothing. The first round begins at 0. It sums: memory is one more copy
  of the parameters, and the last aggregate is kept in checkpoints. Any number
  of clients may be present.

  Args:
    radius: the largest L2 norm of a deviation, the paper's tau, > 0; theirs is
      10 / (1 - momentum).

  Raises:
    TypeError, ValueError: radius is not such a number.

  Example:
    centered_clipping(radius=1.0)
  """
  hparams = {"radius": validate.number("radius", radius, gt=0)}

  def add(
    acc: PyTree,
    updates: PyTree,
    weights: Array,
    present: Array,
    context: AggregationContext,
  ) -> PyTree:
    center = _center(acc, context)

    def clipped(update: PyTree) -> PyTree:
      apart = jax.tree.map(lambda u, c: u.astype(c.dtype) - c, update, center)
      return bounded(apart, context.hparams["radius"])

    ones = jnp.ones_like(weights)
    return add_weighted(acc, jax.vmap(clipped)(updates), ones, present)

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight
    mean = divide(acc, count)
    return jax.tree.map(jnp.add, _center(acc, context), mean)

  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=add,
    finish=finish,
    hparams=hparams,
    keeps_previous=True,
  )


def _center(acc: PyTree, context: AggregationContext) -> PyTree:
  """Return the last aggregate; zeros where there is none."""
  if jax.tree.leaves(context.previous):
    return context.previous
  return jax.tree.map(jnp.zeros_like, acc)
