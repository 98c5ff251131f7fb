"""Training of a cohort: waves, sums over waves, lanes and devices.

A device runs its clients wave after wave and adds every wave to its
accumulators, which are then summed over the devices. With virtual devices
(`RoundSpec.virtual`) a device runs several of them one after the other, and
their sums are added in a fixed order, so that parameters have the same bits on
any number of devices; see `virtual_devices.py`.

`shard_map` runs with `check_vma=False`: with the check, every loop inside a
user's model or algorithm that starts from constants would need a cast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  Examples,
  Members,
  PyTree,
  Shares,
  TransformResult,
  compensated,
)
from fedjax_sim.core import tree as trees
from fedjax_sim.core.types import EMPTY
from fedjax_sim.distributed import AXIS, over_coordinates
from fedjax_sim.engine import client_log
from fedjax_sim.engine.client_log import Entry
from fedjax_sim.engine.client_loop import COHORT_SPEC, over_waves, put_wave
from fedjax_sim.engine.client_round import (
  ClientOutcome,
  ClientPlan,
  ClientStatus,
  RoundInputs,
  train_client,
)
from fedjax_sim.engine.layouts import by_columns, by_rows
from fedjax_sim.engine.loops import FixedLoop, guarded
from fedjax_sim.engine.plan import CohortPlan
from fedjax_sim.engine.round_spec import RoundSpec
from fedjax_sim.engine.tracing import trace_once
from fedjax_sim.engine.virtual_devices import (
  isolate_compilation,
  over_parts,
  sum_over_devices,
)


class CohortSums(NamedTuple):
  """Sums over the cohort.

  Attributes:
    update: the aggregator's accumulator, or its result if the aggregator is
      finishes shares.
    buffers: sum of weight * buffers.
    statistics: sum of weight * statistics.
    released: for every transform, the sum of its results but for update and
      state.
    metrics: name -> `Metric`; a `compensated.Total` until the devices' sums
      are added.
    weight: shape=(), float32; sum of weights, a `compensated.Total` likewise.
    logged: sum of weight * update for the client log; () without one.
  """

  update: PyTree
  buffers: PyTree
  statistics: PyTree
  released: tuple[TransformResult, ...]
  metrics: PyTree
  weight: PyTree
  logged: PyTree = ()


class PerClient(NamedTuple):
  """What a round keeps of every client, leaves (waves, lanes, ...).

  Attributes:
    state: its new row in the table of client states.
    status: int8; a `ClientStatus`.
    weight: float32; its weight, as reported.
    values: name -> numbers, `Report.values`.
    log: its entry in the client log, and from the end of the round on the
      log's columns by name; () if clients are not logged.
    observed: name -> what a sampler observes; empty if none does.
  """

  state: PyTree
  status: Array
  weight: Array
  values: Mapping[str, Array]
  log: Entry | tuple[()] | dict[str, Array] = ()
  observed: Mapping[str, Array] = EMPTY


# Trains a cohort; arguments and results are those of `train_cohort`.
TrainCohort = Callable[..., tuple[CohortSums, Array, PerClient]]


def train_cohort(
  spec: RoundSpec,
  given: RoundInputs,
  data: Mapping[str, Examples],
  states: PyTree,
  cohort: CohortPlan,
  rank: Array,
) -> tuple[CohortSums, Array, PerClient]:
  """Train all clients of a cohort on all devices and sum their reports.

  Args:
    spec: the constants of the round.
    given: what all clients of the round have in common.
    data: source -> examples, copied to every device; if `spec.sliced`, with a
      leading axis of (virtual) devices.
    states: the clients' rows of the table, leaves (devices, waves, lanes, ...).
    cohort: the plan of the round.
    rank: shape=(devices, waves, lanes), int32; the clients' ranks in the
      cohort.

  Returns:
    The sums over the cohort; shape=(statuses,), float32, the number of clients
    with each `ClientStatus`; what is kept of every client, leaves (devices,
    waves, lanes, ...).
  """
  split: Any = P(AXIS)
  whole: Any = P()
  sums_spec = CohortSums(*[whole] * len(CohortSums._fields))
  if spec.aggregator.needs_all_updates and not spec.aggregator.finishes_shares:
    sums_spec = sums_spec._replace(update=split)
  train = distributed.over_devices(
    functools.partial(_train_device, spec),
    spec.mesh,
    in_specs=(
      whole,
      split if spec.sliced else whole,
      split,
      COHORT_SPEC,
      split,
    ),
    out_specs=(sums_spec, whole, split),
  )
  return train(given, data, states, cohort, rank)


def _train_device(
  spec: RoundSpec,
  given: RoundInputs,
  data: Mapping[str, Examples],
  states: PyTree,
  cohort: CohortPlan,
  rank: Array,
) -> tuple[CohortSums, Array, PerClient]:
  """Train one device's share of the cohort and sum with the other devices.

  Arguments and results are as in `train_cohort`, with a leading axis of only
  this device, or of the virtual devices that it stands for.
  """
  grid = ClientPlan(
    cohort.client,
    cohort.version,
    cohort.byzantine,
    cohort.num_examples,
    cohort.start,
    cohort.num_steps,
    cohort.weight,
    states,
  )

  message = by_columns(given.message, spec.virtual is None)

  def alone(row: ClientPlan, data: Mapping[str, Examples]) -> ClientOutcome:
    known = given._replace(message=by_rows(message))
    if spec.waves is not None:  # an empty lane has no derivative
      row, known = guarded(row.client >= 0, (row, known))
    return train_client(spec, row, known, data, cohort.order)

  one = trace_once(alone)
  data_of = lambda i: _at(data, i) if spec.sliced else data
  outcome = jax.eval_shape(lambda: one(_at(grid, 0, 0, 0), data_of(0)))

  def train_part(i: Array | int) -> tuple[CohortSums, PerClient]:
    here = lambda row: one(row, data_of(i))
    waves = lambda: _train_waves(
      spec.aggregator,
      here,
      outcome,
      _at(grid, i),
      cohort.num_waves[i],
      given.aggregation,
      rank[i],
      spec.waves,
      spec.virtual is None,
    )
    return isolate_compilation(spec.virtual, given.round, waves)

  sums, kept = over_parts(train_part, len(cohort.client))
  stack: PyTree = ()
  if spec.aggregator.needs_all_updates:
    end_to_end = lambda x: x.reshape(-1, *x.shape[2:])
    stack = jax.tree.map(end_to_end, sums.update)
    sums = sums._replace(update=())
  sums, counts = _sum_over_devices(spec, sums, kept.status)
  if spec.aggregator.finishes_shares:
    update = _finish_shares(
      spec.aggregator, stack, sums.weight, counts, given.aggregation
    )
    sums = sums._replace(update=update)
  elif spec.aggregator.needs_all_updates:
    sums = sums._replace(update=stack)
  if spec.log_clients:
    kept = kept._replace(log=log_columns(spec, given, kept, sums.logged))
  return sums._replace(logged=()), counts, kept


def _train_waves(
  aggregator: Aggregator,
  one: Callable[[ClientPlan], ClientOutcome],
  outcome: ClientOutcome,
  grid: ClientPlan,
  num_waves: Array,
  context: AggregationContext,
  rank: Array,
  fixed: FixedLoop | None,
  pinned: bool,
) -> tuple[CohortSums, PerClient]:
  """Train all waves of one device, or of one virtual device.

  Args:
    aggregator: how updates become one.
    one: trains a client.
    outcome: the shapes of what `one` returns.
    grid: leaves (waves, lanes, ...).
    num_waves: shape=(), int32; waves in use.
    context: what the aggregator knows of the round.
    rank: shape=(waves, lanes), int32; the clients' ranks in the cohort.
    fixed: see `RoundSpec.waves`.
    pinned: see `by_columns`.
  """
  waves, lanes = grid.client.shape
  sums = zero_sums(aggregator, outcome, waves * lanes)
  grid_zeros = lambda tree: jax.tree.map(
    lambda x: jnp.zeros((waves, lanes, *x.shape), x.dtype), tree
  )
  kept = PerClient(*map(grid_zeros, per_client(outcome)))

  @jax.named_scope("aggregate")
  def fold(acc: PyTree, out: ClientOutcome, w: Array) -> PyTree:
    sums, kept = by_rows(acc)
    here = context._replace(
      slot=w * lanes, rank=rank[w], byzantine=grid.byzantine[w] > 0
    )
    sums = add_wave(aggregator, sums, out, here, outcome)
    return by_columns(sums, pinned), put_wave(kept, per_client(out), w)

  first = by_columns(sums, pinned), kept
  sums, kept = by_rows(over_waves(one, grid, num_waves, fold, first, fixed))
  return sums, kept


def zero_sums(
  aggregator: Aggregator, outcome: ClientOutcome, slots: int
) -> CohortSums:
  """Return the accumulators before the first wave.

  Args:
    aggregator: how updates become one.
    outcome: the shapes of a client's outcome.
    slots: number of client slots on the (virtual) device.
  """
  report = outcome.report
  zeros = trees.zeros_accumulator
  return CohortSums(
    update=aggregator.init(report.update, slots),
    buffers=zeros(report.buffers),
    statistics=zeros(report.statistics),
    released=zeros(outcome.released),
    metrics=compensated.zeros(report.metrics),
    weight=compensated.zeros(report.weight),
    logged=zeros(outcome.log.update) if outcome.log else (),
  )


def add_wave(
  aggregator: Aggregator,
  sums: CohortSums,
  out: ClientOutcome,
  context: AggregationContext,
  outcome: ClientOutcome,
) -> CohortSums:
  """Add the present clients of a wave to the accumulators.

  Args:
    aggregator: how updates become one.
    sums: the accumulators.
    out: the wave's outcomes, leaves (lanes, ...).
    context: what the aggregator knows of the round and of this wave.
    outcome: the shapes of one client's outcome.
  """
  r, present = out.report, out.status == ClientStatus.PRESENT
  ones = jnp.ones_like(r.weight)
  total = trees.add_weighted
  return CohortSums(
    update=aggregator.add(sums.update, r.update, r.weight, present, context),
    buffers=total(sums.buffers, r.buffers, r.weight, present),
    statistics=total(sums.statistics, r.statistics, r.weight, present),
    released=total(sums.released, out.released, ones, present),
    metrics=compensated.add(
      sums.metrics,
      total(
        trees.zeros_accumulator(outcome.report.metrics),
        r.metrics,
        ones,
        present,
      ),
    ),
    weight=compensated.add(
      sums.weight, jnp.sum(jnp.where(present, r.weight, 0))
    ),
    logged=total(sums.logged, out.log.update, r.weight, present)
    if out.log
    else (),
  )


def _sum_over_devices(
  spec: RoundSpec, sums: CohortSums, status: Array
) -> tuple[CohortSums, Array]:
  """Sum the accumulators over all devices and count clients by status.

  Args:
    spec: the constants of the round.
    sums: leaves (virtual devices of this device, ...), or (1, ...).
    status: shape=(virtual devices, waves, lanes), int8.

  Returns:
    The sums, rounded to float32; shape=(statuses,), float32, the counts.
  """
  # As float32, exact up to 2^24 clients, counts travel with the other sums.
  count = lambda status: jnp.bincount(status.ravel(), length=len(ClientStatus))
  counts = jax.vmap(count)(status).astype(jnp.float32)
  with jax.named_scope("aggregate"):
    sums, counts = sum_over_devices((sums, counts), spec.virtual)
    sums = sums._replace(
      metrics=compensated.rounded(sums.metrics),
      weight=compensated.rounded(sums.weight),
    )
  return sums, counts


def _finish_shares(
  aggregator: Aggregator,
  stack: PyTree,
  weight: Array,
  counts: Array,
  context: AggregationContext,
) -> PyTree:
  """Finish an aggregator on a stack, each device its share of coordinates.

  Args:
    aggregator: how updates become one.
    stack: leaves (slots of this device, ...).
    weight: shape=(), float32; sum of the cohort's weights.
    counts: shape=(statuses,), float32; number of clients by status.
    context: what the aggregator knows of the round.
  """
  clients = counts[ClientStatus.PRESENT].astype(jnp.int32)
  if lax.axis_size(AXIS) > 1:
    context = context._replace(shares=Shares(AXIS))
  finish = lambda stack: aggregator.finish(stack, weight, clients, context)
  slots = len(context.rank)
  rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((slots, *x.shape[1:]), x.dtype), stack
  )
  return over_coordinates(finish, stack, jax.eval_shape(finish, rows))


def log_columns(
  spec: RoundSpec, given: RoundInputs, kept: PerClient, direction: PyTree
) -> dict[str, Array]:
  """Return the client log's columns of one device.

  Args:
    spec: the constants of the round.
    given: what all clients of the round have in common.
    kept: with a leading axis of virtual devices, or of 1.
    direction: sum of weight * update over the whole cohort.

  Returns:
    Name -> shape=(virtual devices, waves, lanes).
  """

  def columns(i: Array | int) -> dict[str, Array]:
    mine = _at(kept, i)
    present = mine.status == ClientStatus.PRESENT
    here = lambda: client_log.columns(mine.log, present, direction)
    return isolate_compilation(spec.virtual, given.round, here)

  return over_parts(columns, len(kept.status))


def _at(tree: PyTree, *index: Any) -> Any:
  """Return the tree with all leaves indexed by `index`."""
  return jax.tree.map(lambda x: x[index], tree)


def per_client(outcome: ClientOutcome) -> PerClient:
  """Return what a round keeps of the clients of an outcome."""
  report = outcome.report
  return PerClient(
    outcome.kept,
    outcome.status,
    report.weight,
    report.values,
    outcome.log,
    outcome.observed,
  )


def ranks(cohort: CohortPlan, mesh: Mesh) -> tuple[Array, Array]:
  """Rank the clients of a cohort by their ids.

  Args:
    cohort: the plan of the round.
    mesh: the devices.

  Returns:
    Shape of `cohort.client`, int32: the rank of each slot's client, that of
    empty slots being no less than the number of clients; shape=(), int32: the
    number of clients.
  """
  client = distributed.replicated(cohort.client, mesh)
  there = client.ravel() >= 0
  last = jnp.iinfo(client.dtype).max
  order = jnp.argsort(jnp.where(there, client.ravel(), last))
  rank = jnp.argsort(order).astype(jnp.int32).reshape(client.shape)
  return rank, jnp.sum(there, dtype=jnp.int32)


def cohort_members(cohort: CohortPlan, kept: PerClient, mesh: Mesh) -> Members:
  """List the clients of all devices, in the order of a stack's rows.

  The result is copied to every device, so that sums over it have one order.

  Args:
    cohort: the plan of the round.
    kept: leaves (devices, waves, lanes, ...).
    mesh: the devices.
  """
  flat = lambda x: distributed.replicated(x, mesh).ravel()
  present = flat(kept.status == ClientStatus.PRESENT)
  shown = lambda x: jnp.where(present, flat(x), 0)
  return Members(
    id=flat(cohort.client),
    present=present,
    weight=shown(kept.weight),
    values=jax.tree.map(shown, kept.values),
  )


def write_rows(table: PyTree, client: Array, kept: PerClient) -> PyTree:
  """Write the new states of present clients into the table of client states.

  Args:
    table: leaves (rows, ...).
    client: shape=(devices, waves, lanes), int32; ids.
    kept: leaves (devices, waves, lanes, ...).
  """

  def write(path: Any, rows: Array, new: Array) -> Array:
    if new.dtype != rows.dtype or new.shape[3:] != rows.shape[1:]:
      raise TypeError(
        f"Client state {jax.tree_util.keystr(path)} was {rows.dtype}"
        f"{rows.shape[1:]} and is reported as {new.dtype}{new.shape[3:]}; keep"
        " dtype and shape."
      )
    present = kept.status == ClientStatus.PRESENT
    # Rows of absent clients go beyond the table, where they are dropped.
    where = jnp.where(present, client, rows.shape[0])
    return rows.at[where].set(new, mode="drop")

  return jax.tree_util.tree_map_with_path(write, table, kept.state)
