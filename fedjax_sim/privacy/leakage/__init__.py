"""Leakage: measure what updates reveal, and limit it."""

from fedjax_sim.privacy.leakage.wrapper import leakage

__all__ = [
  "leakage",
]
