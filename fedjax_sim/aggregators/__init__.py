"""Aggregators: streaming means, and stacks of all updates."""

from fedjax_sim.aggregators.means import (
  AGGREGATORS,
  add_weighted,
  check,
  divide,
  exact_accumulator,
  mean,
  median,
  stack,
  sum_,
  weighted_mean,
  zeros_accumulator,
)

__all__ = [
  "AGGREGATORS",
  "add_weighted",
  "check",
  "divide",
  "exact_accumulator",
  "mean",
  "median",
  "stack",
  "sum_",
  "weighted_mean",
  "zeros_accumulator",
]
