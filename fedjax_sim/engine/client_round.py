"""One client's part in a round: train, transform, report, status."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  AggregationContext,
  Array,
  Client,
  Examples,
  HParams,
  Purpose,
  PyTree,
  Report,
  TransformResult,
  in_float32,
  key_for,
  noise_key_for,
  returned,
)
from fedjax_sim.core.tree import all_finite, no_nan, tree_norm
from fedjax_sim.core.types import EMPTY
from fedjax_sim.engine import client_log
from fedjax_sim.engine.client_log import Entry
from fedjax_sim.engine.client_loop import run_client
from fedjax_sim.engine.layouts import trained_by_columns
from fedjax_sim.engine.round_spec import RoundSpec


class RoundInputs(NamedTuple):
  """What all clients of a round have in common; copied to every device.

  Attributes:
    message: the algorithm's broadcast.
    shared: the transforms' shared states, a tuple.
    hparams: the hyper-parameters of this round, after schedules.
    round: shape=(), int32; number of rounds done before this one.
    seed: shape=(), uint32; the run's seed.
    noise_seed: shape=(2,), uint32; the seed of private noise.
    aggregation: what the aggregator knows of the round, as in `finish`.
  """

  message: PyTree
  shared: PyTree
  hparams: HParams
  round: Array
  seed: Array
  noise_seed: Array
  aggregation: AggregationContext


class ClientPlan(NamedTuple):
  """What a round plans for one client; see `plan.Cohort` for shapes.

  Attributes:
    client: its id, -1 for an empty lane.
    version: which version of the broadcast it downloads.
    byzantine: whether it attacks.
    num_examples: distinct examples that it uses.
    start: for every pass, the first entry of the order that it reads.
    num_steps: for every pass, its number of local steps.
    weight: factor of what it weighs.
    state: its row in the table of client states.
  """

  client: Array
  version: Array
  byzantine: Array
  num_examples: Array
  start: Array
  num_steps: Array
  weight: Array
  state: PyTree


class ClientStatus(enum.IntEnum):
  """What became of a lane.

  Attributes:
    EMPTY: the lane had no client.
    PRESENT: the client is in the aggregate.
    REJECTED: the client is left out because its report is not finite.
    NAN_LOSS: the client is left out because a metric is NaN, although its
      update is finite.
  """

  EMPTY = 0
  PRESENT = 1
  REJECTED = 2
  NAN_LOSS = 3


class ClientOutcome(NamedTuple):
  """What one client leaves for the aggregation.

  Attributes:
    report: its report, with the transformed update and without its state.
    released: for every transform, its result without update and state.
    kept: its new row in the table of client states.
    status: shape=(), int8; a `ClientStatus`.
    log: its entry in the client log; () if clients are not logged.
    observed: name -> shape=(), what a sampler observes; empty if none does.
  """

  report: Report
  released: tuple[TransformResult, ...]
  kept: PyTree
  status: Array
  log: Entry | tuple[()] = ()
  observed: Mapping[str, Array] = EMPTY


def train_client(
  spec: RoundSpec,
  row: ClientPlan,
  given: RoundInputs,
  data: Mapping[str, Examples],
  orders: Sequence[Array],
) -> ClientOutcome:
  """Train one client, transform its update and judge its report.

  Args:
    spec: the constants of the round.
    row: what is planned for this client.
    given: what all clients of the round have in common.
    data: source -> examples.
    orders: for every pass, the order array.
  """
  algorithm = spec.algorithm
  own, transform_states = row.state
  ident = jnp.maximum(row.client, 0)
  round_ = given.round
  client = Client(
    message=algorithm.download(given.message, row.version, ident),
    state=own,
    hparams=given.hparams["algorithm"],
    id=ident,
    version=row.version,
    num_examples=row.num_examples,
    num_steps=row.num_steps,
    round=round_,
    key=key_for(given.seed, Purpose.CLIENT, round_, ident),
    noise_key=noise_key_for(given.noise_seed, Purpose.CLIENT, round_, ident),
    byzantine=row.byzantine > 0,
  )
  with jax.named_scope("local_training"):
    client, report = run_client(
      trained_by_columns(algorithm, pinned=spec.virtual is None),
      client,
      row.start,
      spec.walks,
      data,
      orders,
      given.hparams["task"],
      spec.first_pass,
    )
  returned.metrics("Report.metrics", report.metrics)
  weight = jnp.asarray(report.weight, jnp.float32) * row.weight
  report = report._replace(weight=weight)
  privacy = algorithm.privacy
  checked = privacy is not None and privacy.checks_updates
  # What goes into transforms is always checked, even if `postprocess_report`
  # checks updates too: a transform may hide that an update is not finite.
  finite = _finite_report(report, bool(spec.transforms) or not checked)
  update, results = _transform(
    spec, report.update, given, transform_states, ident
  )
  if spec.transforms:
    finite &= all_finite((update, [(r.aux, r.state) for r in results]))
  report = algorithm.postprocess_report(client, report._replace(update=update))
  finite &= _finite_report(report, not checked)
  return ClientOutcome(
    report=report._replace(state=()),
    released=tuple(r._replace(update=(), state=()) for r in results),
    kept=(report.state, tuple(r.state for r in results)),
    status=_status(row.client, finite, report),
    log=client_log.entry(report, update) if spec.log_clients else (),
    observed=_observed(report, update) if spec.observes else {},
  )


def _observed(report: Report, update: PyTree) -> dict[str, Array]:
  """Return what a sampler observes of a client: name -> shape=(), float.

  Args:
    report: what it sends.
    update: of it, before `postprocess_report`.

  Raises:
    ValueError: a metric and a value have the same name.
  """
  sums = in_float32(report.metrics)
  means = {name: m.total / m.weight for name, m in sums.items()}
  means["update/norm"] = tree_norm(update)
  if both := means.keys() & report.values.keys():
    raise ValueError(
      f"Report.metrics and Report.values both have {sorted(both)}, and the"
      " sampler observes both; rename those of Report.values."
    )
  return {**means, **report.values}


def _transform(
  spec: RoundSpec,
  update: PyTree,
  given: RoundInputs,
  states: tuple[PyTree, ...],
  ident: Array,
) -> tuple[PyTree, list[TransformResult]]:
  """Apply all transforms to an update, in order.

  Args:
    spec: the constants of the round.
    update: as the algorithm reports it.
    given: what all clients of the round have in common.
    states: for every transform, the client's own state.
    ident: shape=(), int32; the client's id.

  Returns:
    The transformed update; every transform's result.

  Raises:
    TypeError: a transform returns something else.
  """
  results = []
  for i, transform in enumerate(spec.transforms):
    result = transform.apply(
      update,
      given.shared[i],
      states[i],
      given.hparams["transforms"][transform.name],
      key_for(given.seed, Purpose.TRANSFORM, given.round, ident, i),
    )
    if not isinstance(result, TransformResult):
      raise TypeError(
        f"the transform {transform.name!r} returned"
        f" {returned.described(result)}; let Transform.apply return"
        " TransformResult(update, state)."
      )
    result = jax.tree.map(jnp.asarray, result)
    update = result.update
    results.append(result)
  return update, results


def _status(client: Array, finite: Array, report: Report) -> Array:
  """Return the `ClientStatus` of a lane; shape=(), int8.

  Args:
    client: shape=(), int32; its id, -1 for an empty lane.
    finite: shape=(), bool; whether all but its metrics is finite.
    report: what it sends.
  """
  status = jnp.select(
    [
      client < 0,
      finite & ~no_nan(report.metrics),
      finite,
    ],
    [ClientStatus.EMPTY, ClientStatus.NAN_LOSS, ClientStatus.PRESENT],
    ClientStatus.REJECTED,
  )
  return status.astype(jnp.int8)


def _finite_report(report: Report, with_update: bool) -> Array:
  """Return whether everything but the metrics is finite; shape=(), bool.

  Args:
    report: what a client reports.
    with_update: whether to check the update too.
  """
  report = report._replace(metrics=EMPTY)
  return all_finite(report if with_update else report._replace(update=()))
