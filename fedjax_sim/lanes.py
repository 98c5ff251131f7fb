"""How many clients a device trains at once: measured, not guessed.

On a CPU one lane is often the fastest, on a GPU many lanes fill the chip. For
a few choices the compiled round runs a short part of a real plan; the time of
one wave step, times the steps that a whole round has with that many lanes,
predicts the round, lanes that wait for the longest of their wave included.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fedjax_sim.cohort import Cohort

WORTH = 1.1  # more lanes must be faster by this factor
MEMORY_SHARE = 0.8
PROBE_STEPS = 64


class Choice(NamedTuple):
  """How many lanes, and in words why so many."""

  lanes: int
  reason: str


class Probe(NamedTuple):
  """What was measured with so many lanes.

  Attributes:
    seconds: predicted, of a round.
    device_bytes: memory on one device.
  """

  seconds: float
  device_bytes: int


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


def candidates(cohort_size: int, devices: int) -> list[int]:
  """1, 4, 16, ... and at last the whole cohort's share of one device."""
  most = max(1, -(-cohort_size // devices))
  powers = [4**i for i in range(12) if 4**i < most]
  return [*powers, most]


def shortened(plan: Cohort) -> Cohort:
  """The plan's first waves, about `PROBE_STEPS` steps a device, no more.

  Waves that are left out have no steps, so `wave_steps` counts what is run.
  """
  steps = plan.num_steps.max(axis=-2).sum(axis=-1)  # (..., devices, waves)
  before = np.cumsum(steps, axis=-1) - steps
  waves = np.minimum(plan.num_waves, (before < PROBE_STEPS).sum(axis=-1))
  run = np.arange(steps.shape[-1]) < waves[..., None]
  steps_of_run = np.where(run[..., None, None], plan.num_steps, 0)
  return plan._replace(
    num_waves=waves.astype(np.int32),
    num_steps=np.minimum(steps_of_run, PROBE_STEPS),
  )


def emptied(plan: Cohort) -> Cohort:
  """The plan without any wave: what a call costs that trains nobody."""
  return plan._replace(
    num_waves=np.zeros_like(plan.num_waves),
    num_steps=np.zeros_like(plan.num_steps),
  )


def choose(
  probe: Callable[[int], Probe], sizes: list[int], limit: float
) -> Choice:
  """The number of lanes with the shortest predicted round.

  Goes up the sizes until one is clearly slower than the best or does not fit;
  the first is taken even if it does not.

  Args:
    probe: lanes -> what was measured.
    sizes: increasing.
    limit: bytes that fit on a device.
  """
  best, seconds = sizes[0], float("inf")
  tried: list[str] = []
  for size in sizes:
    measured = probe(size)
    if measured.device_bytes > limit:
      tried.append(f"{size}: too large, {measured.device_bytes / 1e6:.0f} MB")
      break
    tried.append(f"{size}: {1e3 * measured.seconds:.3g} ms")
    if measured.seconds * WORTH < seconds:
      best, seconds = size, measured.seconds
    elif measured.seconds > WORTH * seconds:
      break
  return Choice(best, "predicted time of a round by lanes: " + ", ".join(tried))
