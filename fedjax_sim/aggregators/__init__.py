"""Aggregators: streaming means, and stacks of all updates."""

from fedjax_sim.aggregators.check import check
from fedjax_sim.aggregators.means import mean, sum_, weighted_mean
from fedjax_sim.aggregators.stacked import median, stack
from fedjax_sim.core.tree import (
  add_weighted,
  divide,
  exact_accumulator,
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


AGGREGATORS = {
  "weighted_mean": weighted_mean,
  "mean": mean,
  "sum": sum_,
  "median": median,
  "stack": stack,
}
