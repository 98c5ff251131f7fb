"""The machine: what it is, how much memory is used, how fast it multiplies."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.distributed import cpu

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "optax", "torch")


def pin(number: int) -> None:
  """Keep this process to some of its cores, on Linux; before JAX starts.

  XLA and PyTorch then have as many threads, wherever they divide the work.

  Args:
    number: how many.
  """
  kept = sorted(os.sched_getaffinity(0))[:number]
  for thread in Path("/proc/self/task").iterdir():  # numpy has started some
    os.sched_setaffinity(int(thread.name), kept)


def describe() -> dict[str, Any]:
  """Return versions, cores and devices."""
  versions = {}
  for library in _LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[library] = importlib.metadata.version(library)
  device = jax.devices()[0]
  return {
    "processor": processor(),
    "cpu_count": cpu.count(),
    "backend": jax.default_backend(),
    "device_kind": device.device_kind,
    "devices": jax.device_count(),
    "python": platform.python_version(),
    "versions": versions,
  }


def processor() -> str:
  """Return the name of the CPU."""
  with contextlib.suppress(OSError):
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def forget_peak() -> None:
  """Let `process_peak_bytes` begin anew, where Linux allows it."""
  with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")


def process_peak_bytes() -> int | None:
  """Return the process's peak memory so far; None: not on a CPU.

  It includes all that is compared, and the data. A GPU's peak never begins
  anew.
  """
  if jax.default_backend() != "cpu":
    return None
  unit = 1 if sys.platform == "darwin" else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_peak(size: int | None = None, trials: int = 10) -> float:
  """Return the FLOP/s of one device on products of square float32 matrices.

  On a CPU that is what all cores reach together, however many devices there
  are: XLA divides such a product among them.

  Args:
    size: of the matrices; None: enough to fill the device.
    trials: the best of so many counts.
  """
  if size is None:
    size = 1024 if jax.default_backend() == "cpu" else 8192
  product = jax.jit(jnp.matmul)
  a = jax.random.normal(jax.random.key(0), (size, size))
  product(a, a).block_until_ready()
  times = []
  for _ in range(trials):
    began = time.perf_counter()
    for _ in range(4):
      out = product(a, a)
    out.block_until_ready()
    times.append((time.perf_counter() - began) / 4)
  return 2.0 * size**3 / min(times)
