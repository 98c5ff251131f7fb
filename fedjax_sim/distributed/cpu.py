"""The cores of the CPU; without JAX, for what must not import it."""

from __future__ import annotations

import os

CPU_DEVICES = "FEDJAX_SIM_CPU_DEVICES"  # how many JAX shall make


def count() -> int:
  """Return the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1  # macOS


def cpu_devices() -> int:
  """Return FEDJAX_SIM_CPU_DEVICES, or else the number of cores.

  Raises:
    ValueError: FEDJAX_SIM_CPU_DEVICES is no whole number >= 1.
  """
  text = os.environ.get(CPU_DEVICES)
  if not text:
    return count()
  if not (text.isascii() and text.isdecimal() and int(text)):
    raise ValueError(f"{CPU_DEVICES}={text!r}: give a whole number >= 1.")
  return int(text)
