"""Bulyan: Krum again and again, then a mean around the median.

El Mhamdi et al. 2018, "The hidden vulnerability of distributed learning in
Byzantium" (ICML; arXiv 1802.07927). Krum selects theta = n - 2 f updates, each
from those that are left; of every coordinate the theta - 2 f selected numbers
that are nearest to their median are averaged. So no attacker can hide a large
number in one coordinate of an update that is near the others as a whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.aggregators import rows
from fedjax_sim.aggregators.krum import scores
from fedjax_sim.aggregators.stacked import empty_stack, filled_rows, put_wave
from fedjax_sim.core import AggregationContext, Aggregator, Array, PyTree

SLOPE, OFFSET = 4, 3  # n >= 4 f + 3


def bulyan(f: int | None = None) -> Aggregator:
  """Return Bulyan of Krum.

  Withstands f attackers of n >= 4 f + 3 clients, with what `krum` assumes.
  Weights count nothing. With fewer clients present, f is the largest that they
  allow; with f = 0 it is the mean. Memory is cohort x parameters, over all
  devices; time is cohort^2 x parameters and cohort^3 log(cohort).

  Args:
    f: how many attackers it is to withstand; None for as many as it can.

  Raises:
    TypeError, ValueError: f is no whole number >= 0.

  Example:
    bulyan(f=1)  # of 7 clients or more
  """

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight
    stack, filled = acc
    wide = rows.matrices(stack, filled)
    distances = rows.squared_distances(wide, filled, context.shares)
    tolerated = rows.tolerated(context, count, SLOPE, OFFSET)
    theta = count - 2 * tolerated
    one = jnp.ones((), jnp.int32)

    def select(i: Array, left: Array) -> Array:
      found = scores(distances, left, count - i - tolerated - 2)
      return left & ~rows.lowest(found, one, left, context.rank)

    left = lax.fori_loop(0, theta, select, filled)
    selected = filled & ~left
    near = jnp.arange(len(filled)) < theta - 2 * tolerated
    number = jnp.maximum(theta - 2 * tolerated, 1)

    def around_median(s: Array) -> Array:
      s = jnp.sort(filled_rows(selected, s, jnp.inf), axis=0)
      last = jnp.maximum(theta - 1, 0)
      low = lax.dynamic_index_in_dim(s, last // 2, 0)
      high = lax.dynamic_index_in_dim(s, (last + 1) // 2, 0)
      # Rows that are not selected stay behind; equal ones keep their order.
      gap = jnp.abs(s - (low / 2 + high / 2))
      gap = lax.stop_gradient(jnp.where(jnp.isinf(s), jnp.inf, gap))
      _, nearest = lax.sort((gap, s), dimension=0, num_keys=1)
      total = jnp.sum(filled_rows(near, nearest, 0), axis=0)
      return jnp.where(count > 0, total / number.astype(s.dtype), 0)

    return jax.tree.map(around_median, wide)

  return Aggregator(
    empty_stack,
    put_wave,
    finish,
    needs_all_updates=True,
    by_shares=True,
    hparams=rows.attackers(f),
    min_clients=1 if f is None else SLOPE * f + OFFSET,
  )
