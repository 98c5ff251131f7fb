"""One round, top to bottom: the compiled heart of the simulator.

    message = algorithm.broadcast(server state)
    on every device, wave after wave, lanes in parallel:
      every client walks over its data, reports, transforms its update
      the aggregator takes the wave's updates in
    the devices' accumulators are joined
    server state = algorithm.apply(server state, aggregate)

`make_rounds` builds a pure function of arrays; `program.py` compiles it and
feeds it. The number of rounds is traced, as the trip counts in `client_loop.py`
are.

`shard_map` runs with `check_vma=False`: with the check, every loop inside a
user's model or algorithm that starts from constants would need a cast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import (
  Aggregate,
  Aggregator,
  Algorithm,
  Array,
  Client,
  Context,
  Examples,
  HParams,
  Purpose,
  PyTree,
  Report,
  Roll,
  Transform,
  compensated,
  key_for,
  noise_key_for,
  returned,
)
from fedjax_sim.core import tree as trees
from fedjax_sim.core.tree import all_finite, choose, no_nan
from fedjax_sim.data import Prepare, as_stored
from fedjax_sim.distributed import (
  AXIS,
  ordered_sum,
  over_coordinates,
  packed_psum,
)
from fedjax_sim.engine import client_log
from fedjax_sim.engine.aggregation import (
  CohortSums,
  PerClient,
  T,
  cohort_members,
  isolate_compilation,
  per_client,
  ranks,
  write_rows,
)
from fedjax_sim.engine.client_loop import (
  COHORT_SPEC,
  Walk,
  over_waves,
  put_wave,
  run_client,
)
from fedjax_sim.engine.client_round import (
  ClientOutcome,
  ClientPlan,
  ClientStatus,
  RoundInputs,
)
from fedjax_sim.engine.hparams import Schedule, named, scheduled
from fedjax_sim.engine.plan import Cohort
from fedjax_sim.engine.state import RoundMetrics, RunState


def make_rounds(
  algorithm: Algorithm,
  aggregator: Aggregator,
  transforms: Sequence[Transform],
  *,
  walks: Sequence[Walk],
  num_clients: int,
  mesh: Mesh,
  prepare: Prepare = as_stored,
  sliced: bool = False,
  virtual: int | None = None,
  schedules: Mapping[str, Schedule] = {},
  log_clients: bool = False,
) -> Callable[..., tuple[RunState, RoundMetrics]]:
  """The function that runs up to R rounds in one dispatch.

  Args:
    algorithm: how clients train and the server reacts.
    aggregator: how updates become one.
    transforms: what happens to an update, in order.
    walks: for every pass of the algorithm, how it reads.
    num_clients: how many the algorithm is told there are.
    mesh: devices on the axis `clients`.
    prepare: what is done to the server's examples.
    sliced: a device has only the examples that it needs in a round.
    virtual: how many virtual devices the plan deals clients to; a device does
      the work of several, one after the other, and their sums are added in
      their order. None: the plan is for the mesh's devices.
    schedules: hyper-parameter, such as `client.learning_rate` -> its schedule.
    log_clients: fill `RoundMetrics.client_values`. A device then keeps the
      updates of all its clients of a round.

  Returns:
    (state, hparams, data, cohorts, num_rounds, server_data) -> (state,
    metrics). `data` is source -> field -> (examples, ...), on every device,
    or, if `sliced`, (R, devices, examples, ...); `cohorts` a `Cohort` whose
    leaves have a leading axis of R rounds, of which the first `num_rounds`,
    shape=(), int32, are run; `server_data` as in `Context`; `metrics` a
    `RoundMetrics` whose leaves have a leading axis of R. Pure: it can be
    jitted, vmapped over runs and differentiated forwards.
  """

  def stage(round_: Array, function: Callable[[], T]) -> T:
    return (
      function() if virtual is None else isolate_compilation(round_, function)
    )

  def train_one(
    row: ClientPlan,
    given: RoundInputs,
    data: Mapping[str, Examples],
    orders: Sequence[Array],
  ) -> ClientOutcome:
    message, shared, hparams, round_, seed, noise_seed, _ = given
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
      noise_key=noise_key_for(noise_seed, Purpose.CLIENT, round_, ident),
    )
    with jax.named_scope("local_training"):
      client, report = run_client(
        algorithm, client, row.start, walks, data, orders
      )
    returned.metrics("Report.metrics", report.metrics)
    report = report._replace(weight=jnp.asarray(report.weight, jnp.float32))
    # What transforms get is looked at whoever else does.
    looks = bool(transforms) or not algorithm.checks_updates
    finite = _finite_report(report, looks)

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
      finite &= all_finite((update, aux, kept))
    report = algorithm.send(client, report._replace(update=update))
    finite &= _finite_report(report, not algorithm.checks_updates)

    status = jnp.select(
      [
        row.client < 0,
        finite & ~no_nan(report.metrics),
        finite,
      ],
      [ClientStatus.EMPTY, ClientStatus.NAN_LOSS, ClientStatus.PRESENT],
      ClientStatus.REJECTED,
    )
    return ClientOutcome(
      report=report._replace(state=()),
      aux=tuple(aux),
      kept=(report.state, tuple(kept)),
      status=status.astype(jnp.int8),
      log=client_log.entry(report, update) if log_clients else (),
      seat=row.seat,
    )

  def train_waves(
    one: Callable[[ClientPlan], ClientOutcome],
    outcome: ClientOutcome,
    grid: ClientPlan,
    num_waves: Array,
    roll: Roll | tuple[()],
  ) -> tuple[CohortSums, PerClient]:
    """All waves of one device, or of one virtual device.

    Args:
      one: what a client does.
      outcome: its shapes.
      grid: leaves (waves, lanes, ...).
      num_waves: waves in use.
      roll: what a keyed aggregator knows.
    """
    report = outcome.report
    waves, lanes = grid.client.shape
    zeros = trees.zeros_accumulator
    grid_zeros = lambda tree: jax.tree.map(
      lambda x: jnp.zeros((waves, lanes, *x.shape), x.dtype), tree
    )
    joined = CohortSums(
      update=aggregator.init(report.update, waves * lanes),
      buffers=zeros(report.buffers),
      statistics=zeros(report.statistics),
      aux=zeros(outcome.aux),
      metrics=compensated.zeros(report.metrics),
      weight=compensated.zeros(report.weight),
      logged=zeros(outcome.log.update) if outcome.log else (),
    )
    kept = PerClient(*map(grid_zeros, per_client(outcome)))

    @jax.named_scope("aggregate")
    def fold(
      acc: tuple[CohortSums, PerClient], out: ClientOutcome, w: Array
    ) -> tuple[CohortSums, PerClient]:
      joined, kept = acc
      r, present = out.report, out.status == ClientStatus.PRESENT
      ones = jnp.ones_like(r.weight)
      total = trees.add_weighted
      place = (out.seat, roll) if aggregator.keyed else (w * lanes,)
      joined = CohortSums(
        update=aggregator.add(
          joined.update, r.update, r.weight, present, *place
        ),
        buffers=total(joined.buffers, r.buffers, r.weight, present),
        statistics=total(joined.statistics, r.statistics, r.weight, present),
        aux=total(joined.aux, out.aux, ones, present),
        metrics=compensated.add(
          joined.metrics,
          total(zeros(report.metrics), r.metrics, ones, present),
        ),
        weight=compensated.add(
          joined.weight, jnp.sum(jnp.where(present, r.weight, 0))
        ),
        logged=total(joined.logged, out.log.update, r.weight, present)
        if out.log
        else (),
      )
      return joined, put_wave(kept, per_client(out), w)

    return over_waves(one, grid, num_waves, fold, (joined, kept))

  def train_device(
    given: RoundInputs,
    data: Mapping[str, Examples],
    states: PyTree,
    cohort: Cohort,
    seat: Array | tuple[()],
  ) -> tuple[CohortSums, Array, PerClient]:
    """A device's share of the cohort, whose leading axis is 1, or `virtual`'s.

    Also returns how many clients of the cohort have each `_Status`.
    """
    grid = ClientPlan(
      cohort.client,
      cohort.version,
      cohort.num_examples,
      cohort.start,
      cohort.num_steps,
      states,
      seat,
    )
    one = functools.partial(train_one, given=given, orders=cohort.order)
    at = lambda tree, *i: jax.tree.map(lambda x: x[i], tree)
    data_of = lambda i: at(data, i) if sliced else data
    outcome = jax.eval_shape(lambda: one(at(grid, 0, 0, 0), data=data_of(0)))

    def train_part(i: Array | int) -> tuple[CohortSums, PerClient]:
      here = functools.partial(one, data=data_of(i))
      part = lambda: train_waves(
        here, outcome, at(grid, i), cohort.num_waves[i], given.roll
      )
      return (
        part() if virtual is None else isolate_compilation(given.round, part)
      )

    parts = len(cohort.client)
    if parts == 1:  # no loop around the loops
      joined, kept = jax.tree.map(lambda x: x[None], train_part(0))
    else:
      joined, kept = lax.map(train_part, jnp.arange(parts))
    stack = ()
    if aggregator.stacked:
      end_to_end = lambda x: x.reshape(-1, *x.shape[2:])
      stack = jax.tree.map(end_to_end, joined.update)
      joined = joined._replace(update=())

    # As float32, exact up to 2^24 clients, they travel with the other sums.
    count = lambda status: jnp.bincount(
      status.ravel(), length=len(ClientStatus)
    )
    counts = jax.vmap(count)(kept.status).astype(jnp.float32)
    with jax.named_scope("aggregate"):
      if virtual is None:
        sums, counts = packed_psum(at((joined, counts), 0))
      else:
        sums, counts = ordered_sum((joined, counts), virtual)
      sums = sums._replace(
        metrics=compensated.rounded(sums.metrics),
        weight=compensated.rounded(sums.weight),
      )
    if aggregator.by_coordinate:
      clients = counts[ClientStatus.PRESENT].astype(jnp.int32)
      finish = lambda stack: aggregator.finish(stack, sums.weight, clients)
      finished = jax.eval_shape(finish, stack)
      sums = sums._replace(update=over_coordinates(finish, stack, finished))
    elif aggregator.stacked:
      sums = sums._replace(update=stack)
    if log_clients:

      def columns(i: Array | int) -> dict[str, Array]:
        mine = at(kept, i)
        present = mine.status == ClientStatus.PRESENT
        here = lambda: client_log.columns(mine.log, present, sums.logged)
        return (
          here() if virtual is None else isolate_compilation(given.round, here)
        )

      if parts == 1:
        log = jax.tree.map(lambda x: x[None], columns(0))
      else:
        log = lax.map(columns, jnp.arange(parts))
      kept = kept._replace(log=log)
    return sums._replace(logged=()), counts, kept

  split: Any = P(AXIS)
  whole: Any = P()
  joined_spec = CohortSums(*[whole] * len(CohortSums._fields))
  if aggregator.stacked and not aggregator.by_coordinate:
    joined_spec = joined_spec._replace(update=split)
  train = jax.shard_map(
    train_device,
    mesh=mesh,
    in_specs=(whole, split if sliced else whole, split, COHORT_SPEC, split),
    out_specs=(joined_spec, whole, split),
    axis_names={AXIS},  # what goes along the axis `model` is XLA's to find out
    check_vma=False,
  )

  def one_round(
    state: RunState,
    hparams: HParams,
    data: Mapping[str, Examples],
    cohort: Cohort,
    server_data: Examples | None,
  ) -> tuple[RunState, RoundMetrics]:
    if schedules:
      told = hparams, state.round, state.watch.schedules
      hparams = stage(state.round, lambda: scheduled(schedules, *told))
    seat: Array | tuple[()] = ()
    roll: Roll | tuple[()] = ()
    if aggregator.keyed:
      seat, seats = ranks(cohort, mesh)
      key = key_for(state.seed, Purpose.AGGREGATION, state.round)
      noise = noise_key_for(state.noise_seed, Purpose.AGGREGATION, state.round)
      roll = Roll(key, seats, hparams["aggregator"], noise)
    broadcast = jax.named_scope("broadcast")(algorithm.broadcast)
    given = RoundInputs(
      message=stage(state.round, lambda: broadcast(state.server)),
      shared=state.shared,
      hparams=hparams,
      round=state.round,
      seed=state.seed,
      noise_seed=state.noise_seed,
      roll=roll,
    )
    rows = jnp.maximum(cohort.client, 0)
    states = jax.tree.map(lambda table: table[rows], state.clients)
    joined, counts, kept = train(given, data, states, cohort, seat)
    counts = counts.astype(jnp.int32)
    clients = counts[ClientStatus.PRESENT]
    divide = trees.divide
    members = cohort_members(cohort, kept, mesh)

    @jax.named_scope("server_step")
    def react() -> tuple[PyTree, PyTree, tuple[PyTree, ...]]:
      update = joined.update
      if not aggregator.by_coordinate:
        told = (roll,) if aggregator.keyed else ()
        update = aggregator.finish(update, joined.weight, clients, *told)
      aggregate = Aggregate(
        update=update,
        buffers=divide(joined.buffers, joined.weight),
        statistics=divide(joined.statistics, joined.weight),
        weight=joined.weight,
        clients=clients,
        members=members,
      )
      context = Context(
        hparams=hparams,
        round=state.round,
        key=key_for(state.seed, Purpose.SERVER, state.round),
        noise_key=noise_key_for(state.noise_seed, Purpose.SERVER, state.round),
        num_clients=num_clients,
        server_data=None if server_data is None else prepare(server_data),
      )
      server = algorithm.apply(state.server, aggregate, context)
      aux = divide(joined.aux, clients)
      known = aux  # to the server, where clients are not private
      if algorithm.release is not None:
        known = jax.tree.map(jnp.zeros_like, aux)
      shared = tuple(
        t.update(s, a, hparams["transforms"][t.name])
        for t, s, a in zip(transforms, state.shared, known, strict=True)
      )
      # A cohort of which nobody is left changes nothing; but that there was
      # nobody is not to be seen where clients are private.
      some = (clients > 0) | (algorithm.release is not None)
      server = choose(some, server, state.server)
      return server, choose(some, shared, state.shared), aux

    server, shared, aux = stage(state.round, react)
    new = RunState(
      round=state.round + 1,
      seed=state.seed,
      noise_seed=state.noise_seed,
      server=server,
      clients=write_rows(state.clients, cohort.client, kept),
      shared=shared,
      watch=state.watch,
    )
    values = named(hparams)
    metrics = RoundMetrics(
      clients=clients,
      rejected=counts[ClientStatus.REJECTED] + counts[ClientStatus.NAN_LOSS],
      nan_losses=counts[ClientStatus.NAN_LOSS],
      metrics=joined.metrics,
      aux={t.name: a for t, a in zip(transforms, aux, strict=True)},
      client_rejected=kept.status >= ClientStatus.REJECTED,
      finite=all_finite(algorithm.variables(new.server)._replace(frozen=())),
      client_values=kept.log if isinstance(kept.log, dict) else {},
      scheduled={name: values[name] for name in schedules},
      told=algorithm.told(state.server, hparams),
    )
    return new, metrics

  def rounds(
    state: RunState,
    hparams: HParams,
    data: Mapping[str, Examples],
    cohorts: Cohort,
    num_rounds: Array,
    server_data: Examples | None = None,
  ) -> tuple[RunState, RoundMetrics]:
    first = jax.tree.map(lambda x: x[0], cohorts)
    most = cohorts.num_waves.shape[0]
    one_data = lambda r: jax.tree.map(lambda x: x[r], data) if sliced else data
    shapes = jax.eval_shape(
      lambda: one_round(state, hparams, one_data(0), first, server_data)
    )[1]
    metrics = jax.tree.map(
      lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes
    )

    def body(
      r: Array, carry: tuple[RunState, RoundMetrics]
    ) -> tuple[RunState, RoundMetrics]:
      state, metrics = carry
      cohort = jax.tree.map(lambda x: x[r], cohorts)
      state, new = one_round(state, hparams, one_data(r), cohort, server_data)
      return state, jax.tree.map(lambda m, x: m.at[r].set(x), metrics, new)

    return lax.fori_loop(0, num_rounds, body, (state, metrics))

  return rounds


def _finite_report(report: Report, with_update: bool) -> Array:
  """Return whether all but metrics is finite; shape=(), bool."""
  report = report._replace(metrics={})
  return all_finite(report if with_update else report._replace(update=()))
