"""How cohorts lie on the devices: waves and lanes, planned in numpy.

The clients of a cohort are sorted by their number of local steps and cut into
waves of `lanes` clients; the waves are dealt to the devices so that each gets
about the same number of steps. What a client trains on is one flat array of
example indices, `order`, cut into whole batches: batch `i` of a client is
`order[start + i * batch_size :][:batch_size]` (`batching.py`), where an example
that only fills up a batch is marked by the complement of its index
(`~index < 0`). Which examples these are depends neither on lanes nor on
devices.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.engine.batching import LocalBatching, batches, positions


class Capacity(NamedTuple):
  """The static shapes of a plan.

  Attributes:
    devices: devices of the mesh, or the virtual ones that stand for them.
    waves: waves on one device, at most.
    lanes: clients of a wave.
    order: for every pass, the length of its order array.
    examples: for every pass, distinct examples on one device, at most.
    idle: further devices, which get no clients.
  """

  devices: int
  waves: int
  lanes: int
  order: tuple[int, ...]
  examples: tuple[int, ...]
  idle: int = 0


Ints = Any  # of int32: numpy on the host, jax.Array in the trace


class CohortPlan(NamedTuple):
  """A plan: who trains where, on what. All int32, but for `weight`.

  Attributes:
    client: shape=(devices, waves, lanes), idle devices included; ids, -1 for an
      empty lane.
    version: shape=(devices, waves, lanes); which version of the broadcast.
    byzantine: shape=(devices, waves, lanes); 1 for a client that attacks.
    num_examples: shape=(devices, waves, lanes); distinct examples used.
    start: shape=(devices, waves, lanes, passes); first entry in the order.
    num_steps: shape=(devices, waves, lanes, passes); 0 for an empty lane.
    weight: shape=(devices, waves, lanes), float32; factor of what the client
      weighs, see `Sampler.weights`.
    num_waves: shape=(devices,); how many of the waves are in use.
    order: for every pass, shape=(length,); example indices, complemented
      where they only fill up a batch.
  """

  client: Ints
  version: Ints
  byzantine: Ints
  num_examples: Ints
  start: Ints
  num_steps: Ints
  weight: Any
  num_waves: Ints
  order: Ints


def capacity(
  sizes: Sequence[np.ndarray],
  batchings: Sequence[LocalBatching],
  cohort_size: int,
  *,
  lanes: int,
  devices: int,
  idle: int = 0,
  lower: bool = True,
) -> Capacity:
  """Return shapes that hold any cohort of at most `cohort_size` clients.

  Args:
    sizes: for every pass, examples of every client, shape=(num_clients,).
    batchings: for every pass, what a client does.
    cohort_size: clients in the largest cohort.
    lanes: clients that a device trains at once.
    devices: as in `Capacity`.
    idle: as in `Capacity`.
    lower: lower `lanes` to what a device can fill.
  """
  if lower:
    lanes = min(lanes, -(-cohort_size // devices))
  waves = -(-cohort_size // lanes)
  if devices > 1:  # dealing by steps may give one device more waves
    waves = min(waves, 2 * -(-waves // devices))
  order, examples = [], []
  for size, batching in zip(sizes, batchings, strict=True):
    longest = _sum_of_largest(batching.order_length(size), cohort_size)
    order.append(max(longest, batching.batch_size))
    here = min(cohort_size, waves * lanes)
    examples.append(max(1, _sum_of_largest(batching.examples_used(size), here)))
  return Capacity(devices, waves, lanes, tuple(order), tuple(examples), idle)


def _sum_of_largest(values: np.ndarray, count: int) -> int:
  rest = max(0, len(values) - count)
  return int(np.partition(values, rest)[rest:].sum()) if count else 0


def deal(steps: np.ndarray, devices: int, most: int) -> np.ndarray:
  """Assign waves, longest first, each to the device with the least to do.

  Args:
    steps: shape=(waves,), decreasing.
    devices: how many devices.
    most: waves that a device can hold.

  Returns:
    The device of every wave, and its turn there, shape=(waves, 2).
  """
  if devices == 1:
    turn = np.arange(len(steps))
    return np.stack([np.zeros_like(turn), turn], axis=-1)
  dealt = np.zeros((len(steps), 2), np.int64)
  held = [0] * devices
  heap = [(0, device) for device in range(devices)]
  for wave, cost in enumerate(steps.tolist()):
    load, device = heapq.heappop(heap)
    dealt[wave] = device, held[device]
    held[device] += 1
    if held[device] < most:
      heapq.heappush(heap, (load + cost, device))
  return dealt


def plan(
  offsets: Sequence[np.ndarray],
  batchings: Sequence[LocalBatching],
  ids: np.ndarray,
  shape: Capacity,
  *,
  seed: int,
  round_: int,
) -> CohortPlan:
  """Lay out one cohort; arguments as those of `plan_rounds`."""
  planned, _ = plan_rounds(
    offsets, batchings, [ids], shape, seed=seed, first=round_, rounds=1
  )
  return at_round(planned, 0)


class ExampleSlices(NamedTuple):
  """Which examples lie where, if every device has only those it needs.

  All int64, shape=(used,).

  Attributes:
    round: the round, from 0.
    device: the device.
    place: where on the device.
    row: which example.
  """

  round: np.ndarray
  device: np.ndarray
  place: np.ndarray
  row: np.ndarray


def plan_rounds(
  offsets: Sequence[np.ndarray],
  batchings: Sequence[LocalBatching],
  cohorts: Sequence[np.ndarray],
  shape: Capacity,
  *,
  seed: int,
  first: int,
  rounds: int,
  versions: Sequence[np.ndarray] | None = None,
  weights: Sequence[np.ndarray] | None = None,
  byzantine: Sequence[np.ndarray] | None = None,
  sliced: bool = False,
) -> tuple[CohortPlan, list[ExampleSlices]]:
  """Lay out the cohorts of consecutive rounds, all at once.

  Args:
    offsets: for every pass, the offsets of its federated data.
    batchings: for every pass, what a client does.
    cohorts: for every round, who takes part; ids, shape=(cohort,).
    shape: the static shapes, from `capacity`.
    seed: the run's seed.
    first: the first round.
    rounds: the result's rounds; nobody takes part in those beyond `cohorts`.
    weights: for every round, factors of its ids' weights, shape=(cohort,); None
      for 1.
    versions: for every round, those of its ids, shape=(cohort,); see
      `Client.version`; None: all 0.
    byzantine: for every round, which of its ids attack, shape=(cohort,); None:
      none.
    sliced: every device has the examples of its own clients alone, and
      `order` says where there; otherwise all examples, as they are stored.

  Returns:
    A `CohortPlan` whose leaves have a leading axis of `rounds`, and for every
    pass its slices, if `sliced`.

  Raises:
    ValueError: duplicated or unknown ids, or more than the capacity holds.
  """
  ids, counts = validate.cohorts(cohorts, len(offsets[0]) - 1)
  row, place = positions(counts)  # of each client: its round, its place there
  devices, waves, lanes = shape.devices, shape.waves, shape.lanes
  sizes = [o[ids + 1] - o[ids] for o in offsets]
  steps = np.stack(
    [
      batching.num_steps(size)
      for batching, size in zip(batchings, sizes, strict=True)
    ],
    axis=-1,
  )

  # Longest first; ties by id, so that the layout is a function of the cohort.
  rank = np.lexsort((ids, -steps.sum(-1), row))
  in_use = -(-counts // lanes)
  if in_use.max() > waves * devices:
    raise ValueError(
      f"A cohort of {counts.max()} clients exceeds the"
      f" {waves * devices * lanes} that the round was compiled for; give the"
      " sampler larger `sizes`."
    )
  wave_steps = np.split(
    steps.sum(-1)[rank[place % lanes == 0]], np.cumsum(in_use)[:-1]
  )
  dealt = np.concatenate([deal(part, devices, waves) for part in wave_steps])
  wave = (np.cumsum(in_use) - in_use)[row] + place // lanes
  owner, turn = dealt[wave].T
  where = (row, owner, turn, place % lanes)

  planned = blank(shape, len(batchings), rounds)
  device = np.empty_like(ids)
  device[rank] = owner
  starts, slices = [], []
  for salt, (offset, batching, length) in enumerate(
    zip(offsets, batchings, shape.order, strict=True)
  ):
    made = batches(
      offset, ids, batching, seed=seed, round_=first + row, salt=salt
    )
    if sliced:
      used = batching.examples_used(sizes[salt])
      begin = _begin_in_group(row * devices + device, used)
      order = made.order(begin)
      who, nth = positions(used)
      slices.append(
        ExampleSlices(row[who], device[who], begin[who] + nth, made.rows)
      )
    else:
      order = made.order()
    ends = np.append(made.start, len(order))[np.cumsum(counts)]
    begins = np.append(0, ends[:-1])
    if (ends - begins).max() > length:
      raise ValueError(
        f"A cohort with {(ends - begins).max()} examples exceeds the {length}"
        " that the round was compiled for; give the sampler larger `sizes`."
      )
    for r, (begin, end) in enumerate(zip(begins, ends, strict=True)):
      planned.order[salt][r, : end - begin] = order[begin:end]
    starts.append(made.start - begins[row])

  planned.client[where] = ids[rank]
  if versions is not None:
    planned.version[where] = np.concatenate(versions)[rank]
  if weights is not None:
    planned.weight[where] = np.concatenate(weights)[rank]
  if byzantine is not None:
    planned.byzantine[where] = np.concatenate(byzantine)[rank]
  planned.num_examples[where] = batchings[0].examples_used(sizes[0])[rank]
  planned.start[where] = np.stack(starts, axis=-1)[rank]
  planned.num_steps[where] = steps[rank]
  planned.num_waves[:] = (planned.client[..., 0] >= 0).sum(-1)
  return planned, slices


def _begin_in_group(group: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Return where each piece begins among those of its group, end to end."""
  by_group = np.argsort(group, kind="stable")
  end = np.cumsum(lengths[by_group])
  counts = np.bincount(group)
  before = np.append(0, end)[np.cumsum(counts) - counts]
  begin = np.empty_like(lengths)
  begin[by_group] = end - lengths[by_group] - before[group[by_group]]
  return begin


def fill(
  slices: ExampleSlices,
  array: np.ndarray,
  *,
  rounds: int,
  devices: Sequence[int],
  length: int,
  take: Callable[[np.ndarray, np.ndarray], np.ndarray] = (
    lambda array, rows: array[rows]
  ),
) -> np.ndarray:
  """Copy a field's examples to the positions that the slices give.

  Args:
    slices: where.
    array: (examples, ...); only the rows of these devices are read.
    rounds: of the result.
    devices: which devices' slices, increasing.
    length: of one slice.
    take: (array, rows) -> those rows of the array.

  Returns:
    shape=(rounds, len(devices), length, ...); zeros beyond what is in use.
  """
  out = np.zeros((rounds, len(devices), length, *array.shape[1:]), array.dtype)
  here = np.isin(slices.device, devices)
  round_, device, place, row = (x[here] for x in slices)
  out[round_, np.searchsorted(devices, device), place] = take(array, row)
  return out


def at_round(cohorts: CohortPlan, r: int) -> CohortPlan:
  """Round `r` of plans with a leading axis of rounds; no copy."""
  order = tuple(x[r] for x in cohorts.order)
  return CohortPlan._make([*(x[r] for x in cohorts[:-1]), order])


def blank(shape: Capacity, passes: int, *rounds: int) -> CohortPlan:
  """Return a plan of these shapes in which nobody takes part.

  Args:
    shape: the static shapes.
    passes: the algorithm's passes.
    *rounds: how many rounds, if there is an axis of them.
  """
  devices = shape.devices + shape.idle
  grid = (*rounds, devices, shape.waves, shape.lanes)
  zeros = lambda *more: np.zeros((*grid, *more), np.int32)
  return CohortPlan(
    client=np.full(grid, -1, np.int32),
    version=zeros(),
    byzantine=zeros(),
    num_examples=zeros(),
    start=zeros(passes),
    num_steps=zeros(passes),
    weight=np.ones(grid, np.float32),
    num_waves=np.zeros(grid[:-2], np.int32),
    order=tuple(np.full((*rounds, n), -1, np.int32) for n in shape.order),
  )


class PaddingWaste(NamedTuple):
  """What a plan computes in vain, in batch rows; sums over rounds add up.

  Attributes:
    useful: rows that hold an example.
    batch: rows that fill up partial batches.
    step: rows of lanes that wait for the longest of their wave.
    idle: rows that devices wait for the busiest one.
  """

  useful: int = 0
  batch: int = 0
  step: int = 0
  idle: int = 0

  @property
  def computed(self) -> int:
    """Rows that were computed, with or without an example."""
    return self.useful + self.batch + self.step

  def __add__(self, other: object) -> PaddingWaste:
    if not isinstance(other, PaddingWaste):
      return NotImplemented
    return PaddingWaste(*(a + b for a, b in zip(self, other, strict=True)))


def waste(
  cohort: CohortPlan, batchings: Sequence[LocalBatching], each: int = 1
) -> PaddingWaste:
  """Return what a plan, of one round or several, computes in vain.

  Args:
    cohort: the plan.
    batchings: for every pass, what a client does.
    each: as in `Dealt`.
  """
  lanes = cohort.client.shape[-1]
  total = PaddingWaste()
  for p, (order, batching) in enumerate(
    zip(cohort.order, batchings, strict=True)
  ):
    steps = cohort.num_steps[..., p]
    rows = int(steps.sum()) * batching.batch_size
    per_device = steps.max(-1).sum(-1) * lanes * batching.batch_size
    shape = (*per_device.shape[:-1], -1, each)
    per_device = per_device.reshape(shape).sum(-1)
    useful = int((order >= 0).sum())
    if batching.steps is not None:  # the order holds whole epochs
      useful = _used_rows(cohort, p, batching)
    total += PaddingWaste(
      useful=useful,
      batch=rows - useful,
      step=int(per_device.sum()) - rows,
      idle=int((per_device.max(-1, keepdims=True) - per_device).sum()),
    )
  return total


def _used_rows(cohort: CohortPlan, p: int, batching: LocalBatching) -> int:
  order = cohort.order[p]
  # The rounds' orders end to end.
  first = np.arange(order[..., 0].size)[:, None] * order.shape[-1]
  start = cohort.start[..., p].reshape(len(first), -1) + first
  steps = cohort.num_steps[..., p].reshape(len(first), -1)
  real = np.append(0, np.cumsum(order >= 0))
  return int((real[start + steps * batching.batch_size] - real[start]).sum())


def wave_steps(cohort: CohortPlan) -> int:
  """Return the wave steps of the busiest device."""
  return int(cohort.num_steps.max(-2).sum((-1, -2)).max())
