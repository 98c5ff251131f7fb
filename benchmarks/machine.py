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

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "optax", "torch")


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def describe() -> dict[str, Any]:
  """Versions, cores and devices."""
  versions = {}
  for library in _LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[library] = importlib.metadata.version(library)
  device = jax.devices()[0]
  return {
    "processor": _processor(),
    "cpu_count": cores(),
    "backend": jax.default_backend(),
    "device_kind": device.device_kind,
    "devices": jax.device_count(),
    "python": platform.python_version(),
    "versions": versions,
  }


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def forget_peak() -> None:
  """Lets `peak_bytes` begin anew, where Linux allows it."""
  with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
  """The most memory so far: of the device, or of the process on a CPU."""
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return int(stats["peak_bytes_in_use"])
  unit = 1 if sys.platform == "darwin" else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_peak(size: int = 1024, trials: int = 10) -> float:
  """FLOP/s of one device on products of square float32 matrices.

  Args:
    size: of the matrices.
    trials: the best of so many counts.
  """
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
