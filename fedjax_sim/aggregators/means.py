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
  """The mean of updates, weighted by what clients report (FedAvg)."""
  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=lambda acc, u, w, present, context: add_weighted(acc, u, w, present),
    finish=lambda acc, weight, count, context: divide(acc, weight),
    weighted_mean=True,
  )


def mean() -> Aggregator:
  """The plain mean of updates, every client counting the same."""
  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=lambda acc, u, w, present, context: add_weighted(
      acc, u, jnp.ones_like(w), present
    ),
    finish=lambda acc, weight, count, context: divide(acc, count),
  )


def sum_() -> Aggregator:
  """The plain sum of updates, whatever their weights; whole numbers stay so."""
  return Aggregator(
    init=lambda update, capacity: exact_accumulator(update),
    add=lambda acc, u, w, present, context: add_weighted(
      acc, u, jnp.ones_like(w), present
    ),
    finish=lambda acc, weight, count, context: acc,
  )
