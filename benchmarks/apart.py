"""What benchmarks of stores share: a store, and processes to measure in."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FIELDS, CLASSES = 64, 10
BLOCK = 10_000  # clients that are written at once


def build(
  path: Path, clients: int, shape: tuple[int, ...] = (FIELDS,)
) -> dict[str, float]:
  """Write a store of examples of this shape; return the seconds it took."""
  from fedjax_sim.data import StoreWriter

  began = time.perf_counter()
  with StoreWriter(path, prepare="bytes", num_classes=CLASSES) as store:
    train = store.split("train")
    for first in range(0, clients, BLOCK):
      rng = np.random.default_rng(first)
      count = min(BLOCK, clients - first)
      sizes = rng.integers(1, 40, count)
      labels = rng.integers(0, CLASSES, sizes.sum(), np.uint8)
      x = rng.integers(0, 128, (len(labels), *shape), np.uint8)
      flat = x.reshape(len(labels), -1)
      flat[np.arange(len(labels)), labels] += 100  # there is something to learn
      names = [f"client {i}" for i in range(first, first + count)]
      train.append(names, sizes, {"x": x, "y": labels})
  return {"seconds": time.perf_counter() - began}


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> Any:
  """Call a function in a fresh process; return its result.

  The result gets the process's peak memory, "peak", in bytes. The peaks of
  processes that it starts are included.
  """
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:
    return pool.apply(_measured, (function, *arguments))


def _measured(
  function: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
  peaks: dict[str, int] = {}
  ended = threading.Event()

  def watch() -> None:  # what a process had is not known once it has ended
    while not ended.wait(0.02):
      for tasks in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
          for child in tasks.read_text().split():
            peaks[child] = max(peaks.get(child, 0), _peak(child))

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    result = function(*arguments)
  finally:
    ended.set()
    watcher.join()
  return {**result, "peak": _peak("self") + sum(peaks.values())}


def _peak(process: str) -> int:
  status = Path(f"/proc/{process}/status").read_text()
  found = re.findall(r"VmHWM:\s*(\d+) kB", status)  # none of one that has ended
  return 1024 * int(found[0]) if found else 0
