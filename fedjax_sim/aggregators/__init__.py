"""Aggregators: streaming means, stacks of all updates, robust statistics."""

from fedjax_sim.aggregators.bucketing import bucketing
from fedjax_sim.aggregators.bulyan import bulyan
from fedjax_sim.aggregators.centered_clipping import centered_clipping
from fedjax_sim.aggregators.check import check
from fedjax_sim.aggregators.dnc import dnc
from fedjax_sim.aggregators.geometric_median import geometric_median
from fedjax_sim.aggregators.grouped import Grouped, grouped
from fedjax_sim.aggregators.krum import krum, multi_krum
from fedjax_sim.aggregators.means import mean, sum_, weighted_mean
from fedjax_sim.aggregators.norm_bounding import norm_bounding
from fedjax_sim.aggregators.registry import ROBUST
from fedjax_sim.aggregators.stacked import median, stack
from fedjax_sim.aggregators.trimmed_mean import trimmed_mean
from fedjax_sim.aggregators.votes import majority_vote
from fedjax_sim.aggregators.whole import aggregate
from fedjax_sim.core.tree import (
  add_weighted,
  divide,
  exact_accumulator,
  zeros_accumulator,
)

__all__ = [
  "AGGREGATORS",
  "ROBUST",
  "Grouped",
  "add_weighted",
  "aggregate",
  "bucketing",
  "bulyan",
  "centered_clipping",
  "check",
  "divide",
  "dnc",
  "exact_accumulator",
  "geometric_median",
  "grouped",
  "krum",
  "majority_vote",
  "mean",
  "median",
  "multi_krum",
  "norm_bounding",
  "stack",
  "sum_",
  "trimmed_mean",
  "weighted_mean",
  "zeros_accumulator",
]


AGGREGATORS = {
  "weighted_mean": weighted_mean,
  "mean": mean,
  "sum": sum_,
  "median": median,
  "stack": stack,
  "bucketing": bucketing,
  "bulyan": bulyan,
  "centered_clipping": centered_clipping,
  "dnc": dnc,
  "geometric_median": geometric_median,
  "krum": krum,
  "majority_vote": majority_vote,
  "multi_krum": multi_krum,
  "norm_bounding": norm_bounding,
  "trimmed_mean": trimmed_mean,
}
