"""Local differential privacy: clients randomize what they send."""

from fedjax_sim.privacy.local.mechanism import (
  Randomizer,
  composed,
  default_delta,
  guarantee,
  sentence,
  with_local_dp,
)

__all__ = [
  "Randomizer",
  "composed",
  "default_delta",
  "guarantee",
  "sentence",
  "with_local_dp",
]
