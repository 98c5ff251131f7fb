"""Memory of devices and of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import jax

MEMORY_SHARE = 0.8


def memory_limit(device: jax.Device) -> int:
  """Bytes of the device's memory that a round may take.

  CPU devices share what the machine has left.
  """
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    free = stats["bytes_limit"]
  else:
    free = available_memory() // jax.local_device_count()
  return int(MEMORY_SHARE * free)


def available_memory() -> int:
  """Bytes that the machine can give without swapping."""
  try:
    for line in Path("/proc/meminfo").read_text().splitlines():
      if line.startswith("MemAvailable:"):
        return 1024 * int(line.split()[1])
  except OSError:
    pass  # not Linux
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
