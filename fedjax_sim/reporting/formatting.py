"""Numbers as people read them."""

from __future__ import annotations

import re

import numpy as np


def number(value: float) -> str:
  """Return a number with four digits: 0.3100, 12.34, 12,345, 1.200e-05.

  Whole numbers (ints) are given in full, and floats up to 1e15.
  """
  if isinstance(value, (int, np.integer)) or 1000 <= abs(value) < 1e15:
    return f"{value:,.0f}"
  return f"{value:#.4g}".rstrip(".")


def size(count: float) -> str:
  """Return a number of bytes: 532 B, 1.234 kB, 2.500 GB (powers of 1000)."""
  if abs(count) < 1000:
    return f"{count:.0f} B"
  units = ["kB", "MB", "GB", "TB"]
  count = count / 1000
  while abs(count) >= 999.95 and len(units) > 1:
    count /= 1000
    del units[0]
  return f"{number(count)} {units[0]}"


def metric(name: str, value: float) -> str:
  """Return a metric's value as text; as a size if its name has "bytes"."""
  if "bytes" in re.split("[/_]", name):
    return size(value)
  return number(value)
