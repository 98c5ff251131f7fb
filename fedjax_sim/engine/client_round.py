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
  key_for,
  noise_key_for,
  returned,
)
from fedjax_sim.core.tree import all_finite, no_nan
from fedjax_sim.engine import client_log
from fedjax_sim.engine.client_log import Entry
from fedjax_sim.engine.client_loop import run_client
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
    num_examples: distinct examples that it uses.
    start: for every pass, the first entry of the order that it reads.
    num_steps: for every pass, its number of local steps.
    state: its row in the table of client states.
  """

  client: Array
  version: Array
  num_examples: Array
  start: Array
  num_steps: Array
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
    aux: for every transform, what the server learns besides the update.
    kept: its new row in the table of client states.
    status: shape=(), int8; a `ClientStatus`.
    log: its entry in the client log; () if clients are not logged.
  """

  report: Report
  aux: tuple[PyTree, ...]
  kept: PyTree
  status: Array
  log: Entry | tuple[()] = ()


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
    message=algorithm.download(given.message, row.version),
    state=own,
    hparams=given.hparams,
    id=ident,
    version=row.version,
    num_examples=row.num_examples,
    num_steps=row.num_steps,
    round=round_,
    key=key_for(given.seed, Purpose.CLIENT, round_, ident),
    noise_key=noise_key_for(given.noise_seed, Purpose.CLIENT, round_, ident),
  )
  with jax.named_scope("local_training"):
    client, report = run_client(
      algorithm, client, row.start, spec.walks, data, orders
    )
  returned.metrics("Report.metrics", report.metrics)
  report = report._replace(weight=jnp.asarray(report.weight, jnp.float32))
  # What goes into transforms is always checked, even if `send` checks updates
  # too: a transform may hide that an update is not finite.
  finite = _finite_report(
    report, bool(spec.transforms) or not algorithm.checks_updates
  )
  update, aux, kept = _transform(
    spec, report.update, given, transform_states, ident
  )
  if spec.transforms:
    finite &= all_finite((update, aux, kept))
  report = algorithm.send(client, report._replace(update=update))
  finite &= _finite_report(report, not algorithm.checks_updates)
  return ClientOutcome(
    report=report._replace(state=()),
    aux=tuple(aux),
    kept=(report.state, tuple(kept)),
    status=_status(row.client, finite, report),
    log=client_log.entry(report, update) if spec.log_clients else (),
  )


def _transform(
  spec: RoundSpec,
  update: PyTree,
  given: RoundInputs,
  states: tuple[PyTree, ...],
  ident: Array,
) -> tuple[PyTree, list[PyTree], list[PyTree]]:
  """Apply all transforms to an update, in order.

  Args:
    spec: the constants of the round.
    update: as the algorithm reports it.
    given: what all clients of the round have in common.
    states: for every transform, the client's own state.
    ident: shape=(), int32; the client's id.

  Returns:
    The transformed update; every transform's aux; every transform's new state.
  """
  aux, kept = [], []
  for i, transform in enumerate(spec.transforms):
    update, state, seen = transform.apply(
      update,
      given.shared[i],
      states[i],
      given.hparams["transforms"][transform.name],
      key_for(given.seed, Purpose.TRANSFORM, given.round, ident, i),
    )
    aux.append(seen)
    kept.append(state)
  return update, aux, kept


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
  report = report._replace(metrics={})
  return all_finite(report if with_update else report._replace(update=()))
