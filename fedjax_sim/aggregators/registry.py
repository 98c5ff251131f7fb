"""The aggregators that keep all updates and withstand some false ones."""

from __future__ import annotations

from collections.abc import Callable

from fedjax_sim.aggregators.bulyan import bulyan
from fedjax_sim.aggregators.dnc import dnc
from fedjax_sim.aggregators.geometric_median import geometric_median
from fedjax_sim.aggregators.krum import krum, multi_krum
from fedjax_sim.aggregators.norm_bounding import norm_bounding
from fedjax_sim.aggregators.stacked import median
from fedjax_sim.aggregators.trimmed_mean import trimmed_mean
from fedjax_sim.core import Aggregator

ROBUST: dict[str, Callable[..., Aggregator]] = {
  "bulyan": bulyan,
  "dnc": dnc,
  "geometric_median": geometric_median,
  "krum": krum,
  "median": median,
  "multi_krum": multi_krum,
  "norm_bounding": norm_bounding,
  "trimmed_mean": trimmed_mean,
}
