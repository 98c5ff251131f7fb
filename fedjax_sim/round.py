"""One round, top to bottom: the compiled heart of the simulator.

    message = algorithm.broadcast(server state)
    on every device, wave after wave, lanes in parallel:
      every client walks over its data, reports, transforms its update
      the aggregator takes the wave's updates in
    the devices' accumulators are joined
    server state = algorithm.apply(server state, aggregate)

`make_rounds` builds a pure function of arrays; `simulate.py` compiles it and
feeds it. The trip counts (rounds, waves, local steps) are traced, so nothing
recompiles when a cohort changes. A lane that has done its steps waits for the
longest of its wave: `vmap` of a loop keeps its carry as it is.

`shard_map` runs with `check_vma=False`: with the check, every loop inside a
user's model or algorithm that starts from constants would need a cast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import aggregators
from fedjax_sim.base import (
  Aggregate,
  Aggregator,
  Algorithm,
  Array,
  Batch,
  Client,
  Context,
  Examples,
  HParams,
  Key,
  Metric,
  Purpose,
  PyTree,
  Report,
  Transform,
  key_for,
)
from fedjax_sim.cohort import Cohort
from fedjax_sim.distributed import AXIS


class RunState(NamedTuple):
  """The whole state of a run; what a checkpoint holds.

  Attributes:
    round: shape=(), int32; rounds done.
    seed: shape=(), uint32.
    server: the algorithm's server state.
    clients: the table of what clients keep: leaves (rows, ...), a row a client
      (and padding to a multiple of the devices).
    shared: the transforms' shared states, a tuple.
  """

  round: Array
  seed: Array
  server: PyTree
  clients: PyTree
  shared: PyTree


class RoundMetrics(NamedTuple):
  """What one round tells.

  Attributes:
    clients: shape=(), int32; clients in the aggregate.
    rejected: shape=(), int32; clients left out, not finite.
    metrics: name -> `Metric`, summed over the clients in the aggregate.
    aux: name of a transform -> mean of its aux over them.
    client_rejected: shape=(devices, waves, lanes), bool.
    client_metrics: name -> `Metric`, shape=(devices, waves, lanes).
  """

  clients: Array
  rejected: Array
  metrics: dict[str, Metric]
  aux: dict[str, PyTree]
  client_rejected: Array
  client_metrics: dict[str, Metric]


# A plan's grids are dealt over the devices; every device reads all of `order`.
COHORT_SPEC = Cohort(*[P(AXIS)] * 6, order=P())  # type: ignore[arg-type]


class Walk(NamedTuple):
  """How a pass reads its batches: constants of the compiled round."""

  split: str
  batch_size: int


def traffic(
  algorithm: Algorithm, state: RunState, hparams: HParams
) -> tuple[int, int]:
  """Bytes that one client receives and sends in a round, uncompressed.

  Args:
    algorithm: what it does.
    state: a state, or its shapes.
    hparams: the hyper-parameters, or their shapes.
  """
  passes = len(algorithm.passes)

  def visit(state: RunState, hparams: HParams) -> tuple[PyTree, Report]:
    zero = jnp.zeros((), jnp.int32)
    client = Client(
      message=algorithm.download(algorithm.broadcast(state.server), zero),
      state=jax.tree.map(lambda x: x[0], state.clients[0]),
      hparams=hparams,
      id=zero,
      version=zero,
      num_examples=zero,
      num_steps=jnp.zeros((passes,), jnp.int32),
      round=zero,
      key=key_for(state.seed, Purpose.CLIENT),
    )
    carries: tuple[PyTree, ...] = ()
    for walked in algorithm.passes:
      carries += (walked.start(client, *carries),)
    report = algorithm.finish(client, *carries)
    return client.message, report._replace(state=(), metrics={})

  message, report = jax.eval_shape(visit, state, hparams)
  return nbytes(message), nbytes(report)


def nbytes(tree: PyTree) -> int:
  """Bytes of all arrays, or of all shapes, in the tree."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def all_finite(tree: PyTree) -> Array:
  """Whether every number in the tree is finite; shape=(), bool."""
  finite = jnp.ones((), bool)
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      finite &= jnp.all(jnp.isfinite(leaf))
  return finite


def choose(condition: Array, new: PyTree, old: PyTree) -> PyTree:
  """`new` where the condition holds, else `old`."""
  return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def read_batch(
  examples: Examples, order: Array, first: Array, batch_size: int
) -> Batch:
  """The batch whose entries of `order` begin at `first`."""
  entries = lax.dynamic_slice(order, (first,), (batch_size,))
  rows = jnp.where(entries < 0, ~entries, entries)
  take = lambda x: x.at[rows].get(mode="promise_in_bounds")
  return Batch(jax.tree.map(take, dict(examples)), entries >= 0)


def run_client(
  algorithm: Algorithm,
  client: Client,
  start: Array,
  walks: Sequence[Walk],
  data: Mapping[str, Examples],
  orders: Sequence[Array],
) -> Report:
  """One client's round: its walks over its data, then its report.

  Args:
    algorithm: what it does.
    client: what it knows.
    start: shape=(passes,), int32; where its batches begin in each order.
    walks: for every pass, how it reads.
    data: split -> examples.
    orders: for every pass, the order array.
  """
  carries: tuple[PyTree, ...] = ()
  for p, walked in enumerate(algorithm.passes):
    key = jax.random.fold_in(client.key, p)

    def step(
      i: Array, carry: PyTree, p: int = p, walked: Any = walked, key: Key = key
    ) -> PyTree:
      walk = walks[p]
      first = start[p] + i * walk.batch_size
      batch = read_batch(data[walk.split], orders[p], first, walk.batch_size)
      return walked.step(client, carry, batch, jax.random.fold_in(key, i))

    carry = walked.start(client, *carries)
    carry = lax.fori_loop(0, client.num_steps[p], step, carry)
    carries += (carry,)
  return algorithm.finish(client, *carries)


def over_lanes(one: Callable[[Any], Any], rows: PyTree, lanes: int) -> PyTree:
  """`one` for every lane; a single lane is spared the vmap."""
  if lanes > 1:
    return jax.vmap(one)(rows)
  row = jax.tree.map(lambda x: x[0], rows)
  return jax.tree.map(lambda x: x[None], one(row))


def over_waves(
  one: Callable[[Any], PyTree],
  grid: PyTree,
  num_waves: Array,
  fold: Callable[[PyTree, PyTree, Array], PyTree],
  acc: PyTree,
) -> PyTree:
  """Runs `one` on every client of the grid and folds wave after wave.

  Args:
    one: row -> outputs, for one client.
    grid: leaves (waves, lanes, ...).
    num_waves: shape=(), int32; waves in use.
    fold: (acc, outputs with a lane axis, wave) -> acc.
    acc: the first accumulator.
  """
  lanes = jax.tree.leaves(grid)[0].shape[1]

  def wave(w: Array, acc: PyTree) -> PyTree:
    rows = jax.tree.map(lambda x: x[w], grid)
    return fold(acc, over_lanes(one, rows, lanes), w)

  return lax.fori_loop(0, num_waves, wave, acc)


class _Row(NamedTuple):
  """One client's line of the plan."""

  client: Array
  version: Array
  num_examples: Array
  start: Array
  num_steps: Array
  state: PyTree


class _Outcome(NamedTuple):
  """What one client's round leaves for the aggregation."""

  report: Report  # with the transformed update
  aux: tuple[PyTree, ...]
  kept: PyTree  # its new row in the table of client states
  present: Array  # bool: it took part and is finite
  rejected: Array  # bool: it took part and is not


class _Joined(NamedTuple):
  """Sums over the cohort."""

  update: PyTree  # the aggregator's accumulator
  buffers: PyTree
  statistics: PyTree
  aux: tuple[PyTree, ...]
  metrics: dict[str, Metric]
  weight: Array
  clients: Array
  rejected: Array


class _Kept(NamedTuple):
  """Per client, (waves, lanes, ...)."""

  state: PyTree
  present: Array
  rejected: Array
  metrics: dict[str, Metric]


def make_rounds(
  algorithm: Algorithm,
  aggregator: Aggregator,
  transforms: Sequence[Transform],
  *,
  walks: Sequence[Walk],
  num_clients: int,
  mesh: Mesh,
) -> Callable[..., tuple[RunState, RoundMetrics]]:
  """The function that runs up to R rounds in one dispatch.

  Args:
    algorithm: how clients train and the server reacts.
    aggregator: how updates become one.
    transforms: what happens to an update, in order.
    walks: for every pass of the algorithm, how it reads.
    num_clients: the population.
    mesh: devices on the axis `clients`.

  Returns:
    (state, hparams, data, cohorts, num_rounds) -> (state, metrics). `data` is
    split -> field -> (examples, ...), on every device; `cohorts` a `Cohort`
    whose leaves have a leading axis of R rounds, of which the first
    `num_rounds`, shape=(), int32, are run; `metrics` a `RoundMetrics` whose
    leaves have a leading axis of R. Pure: it can be jitted, vmapped over runs
    and differentiated forwards.
  """

  def train_one(
    row: _Row,
    message: PyTree,
    shared: PyTree,
    hparams: HParams,
    data: Mapping[str, Examples],
    orders: Sequence[Array],
    round_: Array,
    seed: Array,
  ) -> _Outcome:
    own, transform_states = row.state
    ident = jnp.maximum(row.client, 0)
    client = Client(
      message=algorithm.download(message, row.version),
      state=own,
      hparams=hparams,
      id=ident,
      version=row.version,
      num_examples=row.num_examples,
      num_steps=row.num_steps,
      round=round_,
      key=key_for(seed, Purpose.CLIENT, round_, ident),
    )
    report = run_client(algorithm, client, row.start, walks, data, orders)
    finite = all_finite(report._replace(state=(), metrics={}))

    update, aux, kept = report.update, [], []
    for i, transform in enumerate(transforms):
      update, state, seen = transform.apply(
        update,
        shared[i],
        transform_states[i],
        hparams["transforms"][transform.name],
        key_for(seed, Purpose.TRANSFORM, round_, ident, i),
      )
      aux.append(seen)
      kept.append(state)
    if transforms:
      finite &= all_finite((update, aux))

    real = row.client >= 0
    return _Outcome(
      report=report._replace(update=update, state=()),
      aux=tuple(aux),
      kept=(report.state, tuple(kept)),
      present=real & finite,
      rejected=real & ~finite,
    )

  def train_device(
    message: PyTree,
    shared: PyTree,
    hparams: HParams,
    data: Mapping[str, Examples],
    states: PyTree,
    cohort: Cohort,
    round_: Array,
    seed: Array,
  ) -> tuple[_Joined, _Kept]:
    """All waves of one device; its share of the cohort has a leading 1."""
    mine = jax.tree.map(lambda x: x[0], cohort._replace(order=()))
    states = jax.tree.map(lambda x: x[0], states)
    grid = _Row(
      mine.client,
      mine.version,
      mine.num_examples,
      mine.start,
      mine.num_steps,
      states,
    )
    waves, lanes = mine.client.shape
    one = functools.partial(
      train_one,
      message=message,
      shared=shared,
      hparams=hparams,
      data=data,
      orders=cohort.order,
      round_=round_,
      seed=seed,
    )
    outcome = jax.eval_shape(one, jax.tree.map(lambda x: x[0, 0], grid))
    report = outcome.report
    zeros = aggregators.zeros_accumulator
    grid_zeros = lambda tree: jax.tree.map(
      lambda x: jnp.zeros((waves, lanes, *x.shape), x.dtype), tree
    )
    joined = _Joined(
      update=aggregator.init(report.update, waves * lanes),
      buffers=zeros(report.buffers),
      statistics=zeros(report.statistics),
      aux=zeros(outcome.aux),
      metrics=zeros(report.metrics),
      weight=jnp.zeros((), jnp.float32),
      clients=jnp.zeros((), jnp.int32),
      rejected=jnp.zeros((), jnp.int32),
    )
    kept = _Kept(
      grid_zeros(outcome.kept),
      grid_zeros(outcome.present),
      grid_zeros(outcome.rejected),
      grid_zeros(report.metrics),
    )

    def fold(
      acc: tuple[_Joined, _Kept], out: _Outcome, w: Array
    ) -> tuple[_Joined, _Kept]:
      joined, kept = acc
      r, present = out.report, out.present
      ones = jnp.ones_like(r.weight)
      total = aggregators.add_weighted
      joined = _Joined(
        update=aggregator.add(
          joined.update, r.update, r.weight, present, w * lanes
        ),
        buffers=total(joined.buffers, r.buffers, r.weight, present),
        statistics=total(joined.statistics, r.statistics, r.weight, present),
        aux=total(joined.aux, out.aux, ones, present),
        metrics=total(joined.metrics, r.metrics, ones, present),
        weight=joined.weight + jnp.sum(jnp.where(present, r.weight, 0)),
        clients=joined.clients + jnp.sum(present, dtype=jnp.int32),
        rejected=joined.rejected + jnp.sum(out.rejected, dtype=jnp.int32),
      )
      kept = jax.tree.map(
        lambda all_, one_wave: all_.at[w].set(one_wave),
        kept,
        _Kept(out.kept, present, out.rejected, r.metrics),
      )
      return joined, kept

    joined, kept = over_waves(one, grid, mine.num_waves, fold, (joined, kept))
    sums = joined._replace(update=()) if aggregator.stacked else joined
    sums = lax.psum(sums, AXIS)
    if aggregator.stacked:
      sums = sums._replace(update=joined.update)
    return sums, jax.tree.map(lambda x: x[None], kept)

  split, whole = P(AXIS), P()
  joined_spec = _Joined(*[whole] * 8)
  if aggregator.stacked:
    joined_spec = joined_spec._replace(update=split)
  train = jax.shard_map(
    train_device,
    mesh=mesh,
    in_specs=(whole, whole, whole, whole, split, COHORT_SPEC, whole, whole),
    out_specs=(joined_spec, split),
    check_vma=False,
  )

  def one_round(
    state: RunState,
    hparams: HParams,
    data: Mapping[str, Examples],
    cohort: Cohort,
  ) -> tuple[RunState, RoundMetrics]:
    message = algorithm.broadcast(state.server)
    rows = jnp.maximum(cohort.client, 0)
    states = jax.tree.map(lambda table: table[rows], state.clients)
    joined, kept = train(
      message,
      state.shared,
      hparams,
      data,
      states,
      cohort,
      state.round,
      state.seed,
    )
    divide = aggregators.divide
    variables = algorithm.variables(state.server)
    aggregate = Aggregate(
      update=aggregator.finish(joined.update, joined.weight, joined.clients),
      buffers=divide(
        joined.buffers, joined.weight, _buffers(joined, variables.buffers)
      ),
      statistics=divide(joined.statistics, joined.weight),
      weight=joined.weight,
      clients=joined.clients,
    )
    context = Context(
      hparams=hparams,
      round=state.round,
      key=key_for(state.seed, Purpose.SERVER, state.round),
      num_clients=num_clients,
    )
    server = algorithm.apply(state.server, aggregate, context)
    aux = divide(joined.aux, joined.clients)
    shared = tuple(
      t.update(s, a, hparams["transforms"][t.name])
      for t, s, a in zip(transforms, state.shared, aux, strict=True)
    )

    # A cohort of which nobody is left changes nothing.
    some = joined.clients > 0
    new = RunState(
      round=state.round + 1,
      seed=state.seed,
      server=choose(some, server, state.server),
      clients=_write_rows(state.clients, cohort.client, kept),
      shared=choose(some, shared, state.shared),
    )
    metrics = RoundMetrics(
      clients=joined.clients,
      rejected=joined.rejected,
      metrics=joined.metrics,
      aux={t.name: a for t, a in zip(transforms, aux, strict=True)},
      client_rejected=kept.rejected,
      client_metrics=kept.metrics,
    )
    return new, metrics

  def rounds(
    state: RunState,
    hparams: HParams,
    data: Mapping[str, Examples],
    cohorts: Cohort,
    num_rounds: Array,
  ) -> tuple[RunState, RoundMetrics]:
    first = jax.tree.map(lambda x: x[0], cohorts)
    most = cohorts.num_waves.shape[0]
    shapes = jax.eval_shape(one_round, state, hparams, data, first)[1]
    metrics = jax.tree.map(
      lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes
    )

    def body(
      r: Array, carry: tuple[RunState, RoundMetrics]
    ) -> tuple[RunState, RoundMetrics]:
      state, metrics = carry
      cohort = jax.tree.map(lambda x: x[r], cohorts)
      state, new = one_round(state, hparams, data, cohort)
      return state, jax.tree.map(lambda m, x: m.at[r].set(x), metrics, new)

    return lax.fori_loop(0, num_rounds, body, (state, metrics))

  return rounds


def _buffers(joined: _Joined, buffers: PyTree) -> PyTree | None:
  """The dtypes that aggregated buffers go back to, if they are the model's."""
  same = jax.tree.structure(joined.buffers) == jax.tree.structure(buffers)
  return buffers if same else None


def _write_rows(table: PyTree, client: Array, kept: _Kept) -> PyTree:
  """Writes present clients' rows; others' go to a row beyond the table."""

  def write(rows: Array, new: Array) -> Array:
    where = jnp.where(kept.present, client, rows.shape[0])
    return rows.at[where].set(new.astype(rows.dtype), mode="drop")

  return jax.tree.map(write, table, kept.state)
