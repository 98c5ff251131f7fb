"""One round, top to bottom: the compiled heart of the simulator.

    message = algorithm.broadcast(server state)
    (the cohort answers a survey, if the algorithm has one: `survey.py`)
    on every device, wave after wave, lanes in parallel:
      every client trains on its data, reports, transforms its update
      the aggregator adds the wave's updates to its accumulator
    the devices' accumulators are joined
    server state = algorithm.apply(server state, aggregate)

`make_rounds` builds a pure function of arrays; `program.py` compiles and calls
it. What one client does is in `client_round.py`, what a cohort does in
`aggregation.py`. The number of rounds is traced, like the trip counts in
`client_loop.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim import distributed
from fedjax_sim.core import (
  Aggregate,
  AggregationContext,
  Array,
  Context,
  Examples,
  HParams,
  Members,
  Purpose,
  PyTree,
  TransformResult,
  key_for,
  noise_key_for,
)
from fedjax_sim.core.tree import all_finite, divide, tree_where
from fedjax_sim.core.types import EMPTY
from fedjax_sim.engine import client_rows
from fedjax_sim.engine.aggregation import (
  CohortSums,
  TrainCohort,
  cohort_members,
  ranks,
  train_cohort,
)
from fedjax_sim.engine.client_loop import with_numbers
from fedjax_sim.engine.client_round import ClientStatus, RoundInputs
from fedjax_sim.engine.hparams import named, path_of, scheduled
from fedjax_sim.engine.plan import CohortPlan
from fedjax_sim.engine.round_spec import RoundSpec
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.engine.survey import after_survey
from fedjax_sim.engine.tracing import trace_once
from fedjax_sim.engine.virtual_devices import isolate_compilation


def make_rounds(
  spec: RoundSpec,
) -> Callable[..., tuple[RunState, RoundMetrics]]:
  """Build the function that runs up to R rounds in one call.

  Args:
    spec: the constants of the rounds.

  Returns:
    (state, hparams, data, cohorts, num_rounds, server_data) -> (state,
    metrics). `data` is source -> field -> (examples, ...), on every device,
    or, if `sliced`, (R, devices, examples, ...); `cohorts` is a `CohortPlan`
    whose leaves have a leading axis of R rounds, of which the first
    `num_rounds`, shape=(), int32, are run; `server_data` is as in `Context`;
    `metrics` is a `RoundMetrics` whose leaves have a leading axis of R. The
    function is pure: it can be jitted, vmapped over runs and differentiated in
    forward mode. With `spec.waves`, and loops of fixed length in `spec.walks`,
    it runs all R rounds and can be differentiated in reverse mode too.
  """

  def rounds(
    state: RunState,
    hparams: HParams,
    data: Mapping[str, Examples],
    cohorts: CohortPlan,
    num_rounds: Array,
    server_data: Examples | None = None,
  ) -> tuple[RunState, RoundMetrics]:
    at = lambda tree, r: jax.tree.map(lambda x: x[r], tree)
    data_of = lambda r: at(data, r) if spec.sliced else data
    run = trace_once(
      lambda state, r: run_round(
        spec, state, hparams, at(cohorts, r), data_of(r), server_data
      )
    )
    capacity = len(cohorts.num_waves)
    if spec.waves is not None:
      step = run
      if spec.waves.rematerialize:
        step = jax.checkpoint(run, prevent_cse=False)
      return lax.scan(step, state, jnp.arange(capacity, dtype=jnp.int32))
    zeros = lambda x: jnp.zeros((capacity, *x.shape), x.dtype)
    _, shapes = jax.eval_shape(run, state, jnp.zeros_like(num_rounds))
    metrics = jax.tree.map(zeros, shapes)

    def body(r: Array, carry: tuple[RunState, RoundMetrics]) -> PyTree:
      state, metrics = carry
      state, new = run(state, r)
      return state, jax.tree.map(lambda m, x: m.at[r].set(x), metrics, new)

    return lax.fori_loop(0, num_rounds, body, (state, metrics))

  return rounds


def run_round(
  spec: RoundSpec,
  state: RunState,
  hparams: HParams,
  cohort: CohortPlan,
  data: Mapping[str, Examples],
  server_data: Examples | None,
  train: TrainCohort = train_cohort,
) -> tuple[RunState, RoundMetrics]:
  """Run one round: broadcast, train the cohort, make the server's step.

  Args:
    spec: the constants of the round.
    state: the state before it.
    hparams: numeric hyper-parameters, before schedules.
    cohort: the plan of the round.
    data: source -> examples, as in `train_cohort`.
    server_data: the server's own examples; None if it has none.
    train: trains the cohort; another one than `train_cohort` for debugging.

  Returns:
    The state after the round, and its metrics.
  """
  given, rank = _broadcast(spec, state, hparams, cohort)
  states = client_rows.read(state.clients, cohort.client)
  ready = after_survey(spec, given, data, states, cohort, rank, train)
  sums, counts, kept = train(
    ready.spec, ready.given, data, states, ready.cohort, rank
  )
  counts = counts.astype(jnp.int32)
  clients = counts[ClientStatus.PRESENT]
  members = cohort_members(cohort, kept, spec.mesh)
  step = lambda: _server_step(
    spec, state, given, sums, clients, members, server_data, ready.mean
  )
  server, shared, aggregate, released, frozen_finite = isolate_compilation(
    spec.virtual, state.round, step
  )
  new = state._replace(
    round=state.round + 1,
    server=server,
    clients=client_rows.write(state.clients, cohort.client, kept),
    shared=shared,
    aggregate=aggregate,
  )
  values = named(given.hparams)
  metrics = RoundMetrics(
    clients=clients,
    rejected=counts[ClientStatus.REJECTED] + counts[ClientStatus.NAN_LOSS],
    nan_losses=counts[ClientStatus.NAN_LOSS],
    metrics=sums.metrics,
    transforms={
      t.name: r._replace(aux=())
      for t, r in zip(spec.transforms, released, strict=True)
    },
    client_rejected=kept.status >= ClientStatus.REJECTED,
    finite=frozen_finite
    & all_finite(spec.algorithm.variables(new.server)._replace(frozen=())),
    client_values=kept.log if isinstance(kept.log, dict) else {},
    scheduled={
      name: values[str(path_of(name, values))] for name in spec.schedules
    },
    state_metrics=spec.algorithm.state_metrics(
      state.server, given.hparams["algorithm"]
    ),
    observed=jax.tree.map(
      lambda x: jnp.where(kept.status == ClientStatus.PRESENT, x, jnp.nan),
      kept.observed,
    ),
    broadcast_bytes=()
    if spec.algorithm.broadcast_bytes is None
    else spec.algorithm.broadcast_bytes(state.server),
  )
  return new, metrics


def _broadcast(
  spec: RoundSpec, state: RunState, hparams: HParams, cohort: CohortPlan
) -> tuple[RoundInputs, Array]:
  """Return the inputs common to all clients, and the clients' ranks."""
  isolate = functools.partial(isolate_compilation, spec.virtual, state.round)
  if spec.schedules:
    run_wide = hparams, state.round, state.watch.schedules
    hparams = isolate(lambda: scheduled(spec.schedules, *run_wide))
  rank, cohort_size = ranks(cohort, spec.mesh)
  aggregation = AggregationContext(
    key=key_for(state.seed, Purpose.AGGREGATION, state.round),
    noise_key=noise_key_for(state.noise_seed, Purpose.AGGREGATION, state.round),
    slot=jnp.zeros((), jnp.int32),
    rank=rank.ravel(),
    cohort_size=cohort_size,
    hparams=hparams["aggregator"],
    previous=state.aggregate,
    byzantine=distributed.replicated(cohort.byzantine, spec.mesh).ravel() > 0,
  )
  broadcast = jax.named_scope("broadcast")(spec.algorithm.broadcast)
  given = RoundInputs(
    message=isolate(lambda: broadcast(state.server)),
    shared=state.shared,
    hparams=hparams,
    round=state.round,
    seed=state.seed,
    noise_seed=state.noise_seed,
    aggregation=aggregation,
  )
  return given, rank


@jax.named_scope("server_step")
def _server_step(
  spec: RoundSpec,
  state: RunState,
  given: RoundInputs,
  sums: CohortSums,
  clients: Array,
  members: Members,
  server_data: Examples | None,
  survey: PyTree,
) -> tuple[PyTree, PyTree, PyTree, tuple[TransformResult, ...], Array]:
  """Finish the aggregate and apply it to the server's state.

  Returns:
    The new server state; the transforms' new shared states; the aggregator's
    result, if the state keeps it; the mean of every transform's results over
    the clients; whether what the algorithm has changed of the model's frozen
    variables is finite.
  """
  aggregator, algorithm = spec.aggregator, spec.algorithm
  update = sums.update
  if not aggregator.finishes_shares:
    update = aggregator.finish(update, sums.weight, clients, given.aggregation)
  weight = sums.weight
  if aggregator.draws_noise:  # it covers the aggregator's result alone
    weight = clients.astype(weight.dtype)
    counted = members.present.astype(members.weight.dtype)
    members = members._replace(weight=counted, values=EMPTY)
  aggregate = Aggregate(
    update=update,
    buffers=divide(sums.buffers, sums.weight),
    statistics=divide(sums.statistics, sums.weight),
    weight=weight,
    clients=clients,
    members=members,
  )
  if server_data is not None:
    prepared = spec.prepare(server_data)
    server_data = with_numbers(prepared, given.hparams["task"])
  context = Context(
    hparams=given.hparams["algorithm"],
    round=state.round,
    key=key_for(state.seed, Purpose.SERVER, state.round),
    noise_key=noise_key_for(state.noise_seed, Purpose.SERVER, state.round),
    num_clients=spec.num_clients,
    server_data=server_data,
    survey=survey,
  )
  server = algorithm.apply(state.server, aggregate, context)
  released = divide(sums.released, clients)
  aux = tuple(r.aux for r in released)
  private = algorithm.privacy is not None
  # A private server must not learn from the exact aux.
  known = jax.tree.map(jnp.zeros_like, aux) if private else aux
  shared = tuple(
    t.update(s, a, given.hparams["transforms"][t.name])
    for t, s, a in zip(spec.transforms, state.shared, known, strict=True)
  )
  # A cohort of which nobody is left changes nothing, except where clients are
  # private: there, it must not show that nobody was left.
  changes = (clients > 0) | private
  finite = ~changes | all_finite(_changed_frozen(spec, state.server, server))
  server = tree_where(changes, server, state.server)
  shared = tree_where(changes, shared, state.shared)
  kept: PyTree = ()
  if aggregator.keeps_previous:
    old = state.aggregate
    update = jax.tree.map(lambda u, x: u.astype(x.dtype), update, old)
    kept = tree_where(clients > 0, update, old)
  return server, shared, kept, released, finite


def _changed_frozen(spec: RoundSpec, before: PyTree, after: PyTree) -> PyTree:
  """Return the frozen arrays that are others than in the state before.

  What an algorithm hands on as it was is the same object, also while the round
  is traced, so that a large frozen model is not read through for nothing.
  """
  pairs = zip(
    jax.tree.leaves(spec.algorithm.variables(before).frozen),
    jax.tree.leaves(spec.algorithm.variables(after).frozen),
    strict=True,
  )
  return [new for old, new in pairs if new is not old]
