"""Krum and Multi-Krum: the updates with the nearest neighbors.

Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant
gradient descent" (NeurIPS; arXiv 1703.02757). The score of an update is the sum
of its squared distances from its n - f - 2 nearest others.
"""

from __future__ import annotations

from collections.abc import Callable

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

SLOPE, OFFSET = 2, 3  # n >= 2 f + 3


def krum(f: int | None = None) -> Aggregator:
  """Return the one update that has the lowest score.

  Withstands f attackers of n >= 2 f + 3 clients; assumes that honest updates
  are independent, of one distribution and near each other compared with their
  norm. Weights count nothing. With fewer clients present, f is the largest
  that they allow. Of updates with equal scores, such as of two clients alone,
  that of the lowest id is taken. Memory is cohort x parameters, over all
  devices; time is cohort^2 x parameters.

  Args:
    f: how many attackers it is to withstand; None for as many as it can.

  Raises:
    TypeError, ValueError: f is no whole number >= 0.

  Example:
    krum(f=2)  # of 7 clients or more
  """
  return _selecting(f, lambda context, count, tolerated: jnp.ones_like(count))


def multi_krum(f: int | None = None, m: int | None = None) -> Aggregator:
  """Return the mean of the m updates that have the lowest scores.

  As `krum`, of which it is the form that converges faster.

  Args:
    f: how many attackers it is to withstand; None for as many as it can.
    m: of how many updates the mean is taken, of n - f - 2 at most; None for
      that.

  Raises:
    TypeError, ValueError: f is no whole number >= 0, or m none >= 1.

  Example:
    multi_krum(f=2, m=3)
  """
  own = {} if m is None else {"m": float(validate.integer("m", m))}

  def number(
    context: AggregationContext, count: Array, tolerated: Array
  ) -> Array:
    most = jnp.maximum(count - tolerated - 2, 1)
    if "m" not in context.hparams:
      return most
    wanted = jnp.round(context.hparams["m"]).astype(most.dtype)
    return jnp.minimum(wanted, most)

  made = _selecting(f, number)
  needed = 1
  if m is not None and m > 1:  # n - f - 2 >= m, where f may be (n - 3) // 2
    needed = 2 * m if f is None else m + f + 2
  return made._replace(
    hparams={**made.hparams, **own},
    min_clients=max(made.min_clients, needed),
  )


def _selecting(
  f: int | None, number: Callable[[AggregationContext, Array, Array], Array]
) -> Aggregator:
  """Return the mean of the updates with the lowest scores.

  Args:
    f: as in `krum`.
    number: (context, clients, f of this round) -> how many.
  """

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight
    stack, filled = acc
    wide = rows.matrices(stack, filled)
    distances = rows.squared_distances(wide, filled, context.shares)
    tolerated = rows.tolerated(context, count, SLOPE, OFFSET)
    found = scores(distances, filled, count - tolerated - 2)
    many = number(context, count, tolerated)
    chosen = rows.lowest(found, many, filled, context.rank)
    return rows.mean_of(wide, chosen.astype(jnp.float32))

  return Aggregator(
    empty_stack,
    put_wave,
    finish,
    needs_all_updates=True,
    by_shares=True,
    hparams=rows.attackers(f),
    min_clients=1 if f is None else SLOPE * f + OFFSET,
  )


def scores(distances: Array, among: Array, neighbors: Array) -> Array:
  """Return the sum of each row's smallest squared distances from others.

  Args:
    distances: shape=(rows, rows), squared.
    among: shape=(rows,), bool; the rows that count.
    neighbors: shape=(), int; how many distances are summed, at least 1.

  Returns:
    shape=(rows,); infinite where a row does not count, or has no neighbor.
  """
  others = among[:, None] & among[None] & ~jnp.eye(len(among), dtype=bool)
  ordered = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
  nearest = jnp.arange(len(among)) < jnp.maximum(neighbors, 1)
  return jnp.sum(jnp.where(nearest[None], ordered, 0), axis=1)
