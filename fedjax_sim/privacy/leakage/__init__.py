"""Leakage: measure what updates reveal, and limit it."""

from collections.abc import Callable

from fedjax_sim.core import Algorithm
from fedjax_sim.privacy.leakage.wrapper import leakage

# By the statistic of a client's examples that is its leakage.
STATISTICS: dict[str, Callable[..., Algorithm]] = {
  "max": leakage,
  "mean": leakage,
}

__all__ = [
  "STATISTICS",
  "leakage",
]
