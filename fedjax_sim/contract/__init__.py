"""Contract tests of one part, such as a user's own, in a tiny federation."""

from fedjax_sim.contract.checks import Check, check, examine
from fedjax_sim.contract.outcome import (
  Failed,
  Line,
  NotApplicable,
  Outcome,
  Passed,
  table,
)
from fedjax_sim.contract.setting import KINDS, Setting, cut, federation

__all__ = [
  "KINDS",
  "Check",
  "Failed",
  "Line",
  "NotApplicable",
  "Outcome",
  "Passed",
  "Setting",
  "check",
  "cut",
  "examine",
  "federation",
  "table",
]
