"""Divide and conquer: leave out what lies along the direction of most variance.

Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine: optimizing model
poisoning attacks and defenses for federated learning" (NDSS): attackers who act
together stand out along the top singular vector of the centered updates. Those
with the largest squared projections on it are left out.

The paper does so for several random samples of the coordinates, as it computes
singular vectors of a matrix of clients x coordinates. Here they come from the
matrix of clients x clients, so all coordinates are taken, once, and nothing is
drawn.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedjax_sim.aggregators import rows
from fedjax_sim.aggregators.stacked import empty_stack, put_wave
from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  PyTree,
  validate,
)

SLOPE, OFFSET = 2, 1  # n >= 2 f + 1


def dnc(f: int | None = None, fraction: float = 1.0) -> Aggregator:
  """Return the mean of the updates without spectral outliers.

  Leaves out floor(fraction * f) of n >= 2 f + 1 clients. Assumes that
  attackers move together, far enough to dominate the variance: attackers that
  each go another way are not all found. Weights count nothing. With fewer
  clients present, f is the largest that they allow. Memory is cohort x
  parameters, over all devices; time is cohort^2 x parameters and cohort^3.

  Args:
    f: how many attackers there are at most; None for as many as it can take,
      nearly half.
    fraction: times f is how many clients are left out; the paper's c, > 0.

  Raises:
    TypeError, ValueError: a number is out of range.

  Example:
    dnc(f=2)
  """
  own = {"fraction": validate.number("fraction", fraction, gt=0)}

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight
    stack, filled = acc
    wide = rows.matrices(stack, filled)
    gram = rows.centered_gram(wide, filled, context.shares)
    # Less the mean row, too: (1 - J / n) G (1 - J / n).
    n = jnp.maximum(count, 1).astype(gram.dtype)
    of_row = jnp.sum(gram, axis=1) / n
    gram = gram - of_row[:, None] - of_row[None] + jnp.sum(of_row) / n
    gram = jnp.where(filled[:, None] & filled[None], gram, 0)
    top = jnp.linalg.eigh(gram)[1][:, -1]
    tolerated = rows.tolerated(context, count, SLOPE, OFFSET)
    outliers = jnp.floor(context.hparams["fraction"] * tolerated)
    many = jnp.maximum(count - outliers.astype(count.dtype), 1)
    kept = rows.lowest(top**2, many, filled, context.rank)
    return rows.mean_of(wide, kept.astype(jnp.float32))

  return Aggregator(
    empty_stack,
    put_wave,
    finish,
    needs_all_updates=True,
    by_shares=True,
    hparams={**rows.attackers(f), **own},
    min_clients=1 if f is None else SLOPE * f + OFFSET,
  )
