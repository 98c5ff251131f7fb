"""Metrics that are known by name: what people call them, what is better.

Imports no JAX, so that reports can show names without it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TOP_K = re.compile(r"top_([1-9]\d*)")  # top_5: the label is among five
CELLS = "confusion"  # a metric of many numbers, "confusion/TRUE/PREDICTED"

PERCENTILES = (10, 50, 90)  # over clients, reported for each metric
SPREADS = ("std", "gini")  # how unequal clients are, of which less is better
STATISTICS = (
  *("mean", *(f"p{q}" for q in PERCENTILES)),
  *("lowest10", "highest10", *SPREADS),
)


class Known(NamedTuple):
  """A metric that is known by name.

  Attributes:
    title: what reports and curves call it.
    higher_is_better: None where neither is better.
  """

  title: str
  higher_is_better: bool | None


KNOWN = {
  "loss": Known("Loss", False),
  "accuracy": Known("Accuracy", True),
  "auc": Known("AUC", True),
  "f1": Known("F1", True),
  "f1_macro": Known("F1 (macro)", True),
  "f1_micro": Known("F1 (micro)", True),
  "perplexity": Known("Perplexity", False),
  "calibration_error": Known("Calibration error", False),
  "mae": Known("Mean absolute error", False),
  "r2": Known("R2", True),
  CELLS: Known("Confusion", None),
  "attack_success": Known("Attack success", False),
}


def known(name: str) -> Known | None:
  """Return what is known of a metric; None for one of a user's own.

  Args:
    name: such as "f1_macro" or "top_5".

  Example:
    >>> known("top_5").title
    'Top-5 accuracy'
  """
  if found := TOP_K.fullmatch(name):
    return Known(f"Top-{found[1]} accuracy", True)
  return KNOWN.get(name)


def title(name: str) -> str:
  """Return what reports call a metric: a known one's title, or its name."""
  found = known(name)
  return name.capitalize() if found is None else found.title


def display(key: str) -> str:
  """Return a metric as reports show it, with the title of a known one.

  Loss and accuracy, whose names say it already, keep them.

  Example:
    >>> display("unseen/f1_macro/p10")
    'unseen/F1 (macro)/p10'
  """

  def shown(part: str) -> str:
    found = None if part in ("loss", "accuracy") else known(part)
    return part if found is None else found.title

  return "/".join(map(shown, key.split("/")))


def is_cell(key: str) -> bool:
  """Return whether a metric such as "test/confusion/0/1" is a table's cell."""
  return CELLS in key.split("/")[:-2]
