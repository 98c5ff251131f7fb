"""Evaluation in pieces: the clients that devices evaluate at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedjax_sim.data import FederatedData
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.plan import Capacity, CohortPlan


def in_pieces(
  data: FederatedData,
  batching: LocalBatching,
  most: float,
  *,
  lanes: int,
  devices: int,
  most_clients: float = math.inf,
) -> tuple[list[np.ndarray], Capacity]:
  """Split clients into groups evaluated at once, and return plan shapes.

  Args:
    data: the set.
    batching: its batches.
    most: examples that a device has room for.
    lanes: clients that a device evaluates at once.
    devices: how many there are.
    most_clients: clients in a piece, as the memory for their states asks for.

  Returns:
    All clients with examples, in one piece if it has room; else in pieces of
    half of that, as one is on its way while another is evaluated.
  """
  ids = np.flatnonzero(data.sizes > 0)
  # In pieces as many as of the whole: how metrics are rounded hangs on them.
  lanes = min(lanes, -(-len(ids) // devices))
  fits = len(ids) <= most_clients
  if fits and data.num_examples <= most * devices:  # or it is not worth a plan
    whole = _fitting(data, batching, [ids], lanes, devices)
    if whole.examples[0] <= most:
      return [ids], whole
  pieces = [
    part
    for piece in _cut(data.sizes, ids, most / 2, lanes, devices)
    for part in np.array_split(piece, math.ceil(len(piece) / most_clients) or 1)
  ]
  return pieces, _fitting(data, batching, pieces, lanes, devices)


def _cut(
  sizes: np.ndarray, ids: np.ndarray, most: float, lanes: int, devices: int
) -> list[np.ndarray]:
  """Split clients into consecutive groups that fit on a device.

  Args:
    sizes: examples of every client.
    ids: the clients, in this order.
    most: examples on a device.
    lanes: clients of a wave.
    devices: to which waves are dealt, evenly.
  """
  begins = []
  total = largest = 0
  for i, size in enumerate(sizes[ids].tolist()):
    more, wave = total + size, lanes * max(largest, size)
    if total and min(more, more / devices + wave) > most:
      begins.append(i)
      total = largest = 0
    total, largest = total + size, max(largest, size)
  return np.split(ids, begins)


def _fitting(
  data: FederatedData,
  batching: LocalBatching,
  pieces: Sequence[np.ndarray],
  lanes: int,
  devices: int,
) -> Capacity:
  """Return the smallest shapes into which every group fits."""
  capacities = [
    plans.capacity(
      [data.sizes[ids]],
      [batching],
      len(ids),
      lanes=lanes,
      devices=devices,
      lower=False,
    )
    for ids in pieces
  ]
  shape = capacities[0]._replace(
    waves=max(c.waves for c in capacities),
    order=(max(c.order[0] for c in capacities),),
  )
  slices = (planned(data, batching, ids, shape)[1] for ids in pieces)
  return shape._replace(examples=(1 + max(int(s.place.max()) for s in slices),))


def planned(
  data: FederatedData, batching: LocalBatching, ids: np.ndarray, shape: Capacity
) -> tuple[CohortPlan, plans.ExampleSlices]:
  """Return the plan of a group, and the positions of examples on devices."""
  laid_out, (slices,) = plans.plan_rounds(
    [data.offsets],
    [batching],
    [ids],
    shape,
    seed=0,
    first=0,
    rounds=1,
    sliced=True,
  )
  return plans.at_round(laid_out, 0), slices
