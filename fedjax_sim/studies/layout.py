"""Where the runs of a program stand: on which device, beside which others.

A device has several groups of runs, and a group several rows. The runs of a
group have the same plan (cohorts and batches) in every round, so that batches
are read once for all rows. Groups have plans of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import PyTree

SPARE = 1.15  # empty places, relative to the fewest possible, for wider groups


class Layout(NamedTuple):
  """The places of runs.

  Attributes:
    place: shape=(devices, groups, rows), int; the run in each place, by its
      position among those laid out. Places without a run of their own repeat
      one of their group, or any, whose results nobody reads.
    used: shape=(devices, groups, rows), bool; False in those.
  """

  place: np.ndarray
  used: np.ndarray

  def pack(self, stacked: PyTree) -> PyTree:
    """Return leaves (devices, groups, rows, ...) of leaves (runs, ...)."""
    return jax.tree.map(lambda x: np.asarray(x)[self.place], stacked)

  def unpack(self, packed: PyTree) -> PyTree:
    """Return leaves (runs, ...) of leaves (devices, groups, rows, ...)."""
    runs, first = np.unique(self.place[self.used], return_index=True)
    where = np.argwhere(self.used)[first].T
    assert len(runs) == self.used.sum()
    return jax.tree.map(lambda x: np.asarray(x)[tuple(where)], packed)

  def at(self, run: int) -> tuple[int, int, int]:
    """Return the place of a run."""
    device, group, row = np.argwhere((self.place == run) & self.used)[0]
    return int(device), int(group), int(row)

  def leaders(self) -> list[list[int]]:
    """Return for every device and group a run whose plan it follows."""
    runs: list[list[int]] = self.place[:, :, 0].tolist()
    return runs


def lay_out(plans: Sequence[Hashable], devices: int, widest: int) -> Layout:
  """Return places for runs, in as few and as wide groups as fit.

  Args:
    plans: for every run, what its plan depends on; equal ones share a group.
    devices: how many devices.
    widest: the most rows of a group.
  """
  by_plan: dict[Any, list[int]] = {}
  for run, plan in enumerate(plans):
    by_plan.setdefault(plan, []).append(run)

  def blocks(rows: int) -> list[list[int]]:
    return [
      members[i : i + rows]
      for members in by_plan.values()
      for i in range(0, len(members), rows)
    ]

  def places(rows: int) -> int:
    return -(-len(blocks(rows)) // devices) * devices * rows

  greatest = min(widest, max(map(len, by_plan.values())))
  choices = range(1, greatest + 1)
  fewest = min(map(places, choices))
  rows = max(r for r in choices if places(r) <= SPARE * fewest)
  filled = blocks(rows)
  groups = -(-len(filled) // devices)
  place = np.zeros((devices, groups, rows), np.int64)
  used = np.zeros(place.shape, bool)
  for i in range(devices * groups):
    # Devices take turns, so that they have about as much to do.
    group, device = divmod(i, devices)
    members = filled[min(i, len(filled) - 1)]
    place[device, group] = np.resize(members, rows)
    used[device, group, : len(members)] = i < len(filled)
  return Layout(place, used)
