"""Local differential privacy: clients randomize what they send."""

from fedjax_sim.privacy.local.mechanism import (
  Randomizer,
  composed,
  default_delta,
  guarantee,
  local_privacy,
  sentence,
)

__all__ = [
  "Randomizer",
  "composed",
  "default_delta",
  "guarantee",
  "local_privacy",
  "sentence",
]
