"""Privacy accounting: ledgers, accountants, calibration, composition."""

from fedjax_sim.privacy.accounting.ledger import (
  MEANING,
  MOST_MULTIPLIER,
  NOISES,
  Ledger,
  check_delta,
  rounded_up,
  usual_accountant,
)

__all__ = [
  "MEANING",
  "MOST_MULTIPLIER",
  "NOISES",
  "Ledger",
  "check_delta",
  "rounded_up",
  "usual_accountant",
]
