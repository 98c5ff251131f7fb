"""Memory of devices and of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import jax

MEMORY_SHARE = 0.8


def memory_limit(device: jax.Device) -> int:
  """Return the bytes of a device's memory that a round may take.

  CPU devices share what the machine has available.
  """
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    free = stats["bytes_limit"]
  else:
    free = available_memory() // jax.local_device_count()
  return int(MEMORY_SHARE * free)


def available_memory(root: Path = Path("/")) -> int:
  """Return the bytes that this process can take without swapping.

  What the machine has left, or the process's control groups if that is less:
  a container that takes more is killed.

  Args:
    root: of the file system; tests have one of their own.
  """
  return min([_machine_memory(root), *_group_memory(root)])


def _machine_memory(root: Path) -> int:
  try:
    for line in (root / "proc/meminfo").read_text().splitlines():
      if line.startswith("MemAvailable:"):
        return 1024 * int(line.split()[1])
  except OSError:
    pass  # not Linux
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_memory(root: Path) -> list[int]:
  """Return the bytes left in the process's control groups and their parents.

  Control groups of versions 1 and 2; a group without a limit is left out.
  """
  try:
    lines = (root / "proc/self/cgroup").read_text().splitlines()
  except OSError:
    return []
  found = []
  for line in lines:
    _, controllers, path = line.split(":", 2)
    if controllers == "":  # version 2
      top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
      cache = "inactive_file"
    elif "memory" in controllers.split(","):
      top = root / "sys/fs/cgroup/memory"
      names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
      cache = "total_inactive_file"
    else:
      continue
    group = Path(path.lstrip("/"))
    for inner in (group, *group.parents):
      left = _left(top / inner, names, cache)
      if left is not None:
        found.append(left)
  return found


def _left(group: Path, names: tuple[str, str], cache: str) -> int | None:
  """Return a group's limit minus its use, not counting droppable file cache."""
  try:
    limit, used = ((group / name).read_text().strip() for name in names)
    if limit == "max":
      return None
    stat = (group / "memory.stat").read_text().split()
    dropped = int(dict(zip(stat[::2], stat[1::2], strict=True)).get(cache, 0))
    return max(0, int(limit) - int(used) + dropped)
  except (OSError, ValueError):  # in a container, whose groups lie elsewhere
    return None
