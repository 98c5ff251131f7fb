"""The geometric median of updates, by smoothed Weiszfeld steps.

Pillutla et al. 2019, "Robust aggregation for federated learning" (RFA; arXiv
1912.13445): v minimizes sum_i w_i ||x_i - v||. A step takes the mean of the x_i
with the weights w_i / max(nu, ||x_i - v||).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.aggregators import rows
from fedjax_sim.aggregators.norm_bounding import bounded_mean
from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  PyTree,
  validate,
)


def geometric_median(smoothing: float = 1e-6, steps: int = 10) -> Aggregator:
  """Return the weighted geometric median.

  Withstands attackers with less than half of the weight, so where clients say
  themselves how many examples they have, let weights be uniform. The iteration
  begins at the mean of the updates scaled down to their median norm, which no
  attacker can move far, where the paper begins at the mean. Any number of
  clients may be present. Memory is cohort x parameters, over all devices; time
  is steps x cohort x parameters.

  Args:
    smoothing: distances below it count as that; the paper's nu, > 0.
    steps: how many Weiszfeld steps; the paper finds three enough for accuracy,
      as each is a round of communication there.

  Raises:
    TypeError, ValueError: a number is out of range.

  Example:
    geometric_median(steps=30)
  """
  hparams = {"smoothing": validate.number("smoothing", smoothing, gt=0)}
  steps = validate.integer("steps", steps)

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight, count
    stack, filled, weights = acc
    wide = rows.matrices(stack, filled)
    used = filled & (weights > 0)

    @jax.checkpoint  # or reverse mode would keep differences of every step
    def step(v: PyTree, _: None) -> tuple[PyTree, None]:
      apart = jax.tree.map(lambda s, mean: s - mean[None], wide, v)
      far = rows.norms(rows.matrices(apart, filled), context.shares)
      far = jnp.maximum(far, context.hparams["smoothing"])
      nearest = jnp.min(jnp.where(used, far, jnp.inf))
      near = jnp.where(jnp.any(used), nearest, 1) / far  # up to 1
      return rows.mean_of(wide, jnp.where(used, weights * near, 0)), None

    start = bounded_mean(wide, filled, weights, 1.0, context.shares)
    return lax.scan(step, start, length=steps)[0]

  return Aggregator(
    rows.empty_rows,
    rows.put_rows,
    finish,
    needs_all_updates=True,
    by_shares=True,
    hparams=hparams,
  )
