"""Streaming aggregators: means and sums.

They keep one accumulator of the parameters' size, whatever the cohort's size.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedjax_sim.core import Aggregator
from fedjax_sim.core.tree import (
  add_weighted,
  divide,
  exact_accumulator,
  zeros_accumulator,
)


def weighted_mean() -> Aggregator:
  """Return the mean of updates, weighted by clients' weights (FedAvg)."""
  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=lambda acc, u, w, present, context: add_weighted(acc, u, w, present),
    finish=lambda acc, weight, count, context: divide(acc, weight),
    weighted_mean=True,
  )


def mean() -> Aggregator:
  """Return the plain mean of updates, whatever their weights."""
  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=lambda acc, u, w, present, context: add_weighted(
      acc, u, jnp.ones_like(w), present
    ),
    finish=lambda acc, weight, count, context: divide(acc, count),
  )


def sum_() -> Aggregator:
  """Return the plain sum of updates; sums of integers are exact."""
  return Aggregator(
    init=lambda update, capacity: exact_accumulator(update),
    add=lambda acc, u, w, present, context: add_weighted(
      acc, u, jnp.ones_like(w), present
    ),
    finish=lambda acc, weight, count, context: acc,
  )
