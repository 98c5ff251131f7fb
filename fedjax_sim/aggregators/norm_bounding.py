"""Norm bounding: updates scaled down to the median norm of their cohort.

Sun et al. 2019, "Can you really backdoor federated learning?" (arXiv
1911.07963) bound norms by a given number, which is the transform `clip`. Here
the bound is that of the cohort, so that it follows the training.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators import rows
from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  PyTree,
  Shares,
  validate,
)


def norm_bounding(factor: float = 1.0) -> Aggregator:
  """Return the weighted mean of updates, none longer than the median one.

  An update counts as much as one of the bound's norm at most, which fewer than
  half of the clients cannot lift above the largest honest norm. It is no
  outlier test: f of n equally weighted attackers of one direction move the mean
  by f / n of the bound. Weights are taken as they are, so where clients say
  themselves how many examples they have, let weights be uniform. Any number of
  clients may be present. Memory is cohort x parameters, over all devices.

  Args:
    factor: times the cohort's median norm is the bound, > 0.

  Raises:
    TypeError, ValueError: factor is not such a number.

  Example:
    norm_bounding(factor=2.0)
  """
  hparams = {"factor": validate.number("factor", factor, gt=0)}

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight, count
    stack, filled, weights = acc
    wide = rows.matrices(stack, filled)
    own = context.hparams["factor"]
    return bounded_mean(wide, filled, weights, own, context.shares)

  return Aggregator(
    rows.empty_rows,
    rows.put_rows,
    finish,
    needs_all_updates=True,
    by_shares=True,
    hparams=hparams,
  )


def bounded_mean(
  wide: PyTree,
  filled: Array,
  weights: Array,
  factor: Array | float,
  shares: Shares,
) -> PyTree:
  """Return the weighted mean of rows, scaled down to the median norm.

  Args:
    wide: leaves (rows, ...), as `rows.matrices` returns them.
    filled: shape=(rows,), bool.
    weights: shape=(rows,), >= 0.
    factor: shape=(); times the (lower) median norm is the bound.
    shares: how the coordinates are dealt.
  """
  lengths = rows.norms(wide, shares)
  bound = factor * rows.lower_median(lengths, filled)
  longer = lengths > bound
  scale = jnp.where(longer, bound / jnp.where(longer, lengths, 1), 1)
  short = jax.tree.map(
    lambda s: s * scale.reshape((-1,) + (1,) * (s.ndim - 1)).astype(s.dtype),
    wide,
  )
  return rows.mean_of(short, weights)
