"""Secure aggregation: the server learns only the sum of updates."""

from fedjax_sim.privacy.secure.masking import (
  Code,
  Received,
  client_mask,
  modulo,
  secure,
  signed,
  unmasked,
)

__all__ = [
  "Code",
  "Received",
  "client_mask",
  "modulo",
  "secure",
  "signed",
  "unmasked",
]
