"""Stale updates: some clients' reports arrive a round late.

FLUTE's `stale_prob`: every client's report is late with the same probability,
by itself. The server joins what is late with the reports of the next round; a
sum is kept, so nothing is lost and nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  HParams,
  Key,
  PyTree,
  Report,
  validate,
)
from fedjax_sim.core.tree import zeros_accumulator
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.training.wrappers import wrap_algorithm

MOST_EXPONENT = 60.0  # float32 ends at 88, and weights are summed
_TAG = 0x6C617465  # of the key: no number that an algorithm would fold in


class Sums(NamedTuple):
  """Weighted sums over clients."""

  update: PyTree
  buffers: PyTree
  statistics: PyTree
  weight: Array  # shape=(), float32


class StaleState(NamedTuple):
  """A server, and what is still on its way to it."""

  server: PyTree
  late: Sums
  log_weight: Array  # `Algorithm.log_weight` where the late ones began


class _Sent(NamedTuple):
  """A report twice; one of the two is 0."""

  now: Sums
  late: Sums


def stale(algorithm: Algorithm, probability: float) -> Algorithm:
  """Return the algorithm with reports that may come a round late.

  A late report keeps its weight. A round in which nothing arrives leaves the
  server as it is. Works with the aggregator `weighted_mean` alone.

  Args:
    algorithm: one that takes a mean.
    probability: of being late, from 0 to 1.

  Raises:
    TypeError, ValueError: no such probability, or an algorithm that wants a
      stack, or is private.
  """
  chance = validate.number("server.stale_probability", probability, ge=0, le=1)
  _check(algorithm, probability)

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    report = inner(report)
    key = jax.random.fold_in(client.key, _TAG)
    late = jax.random.uniform(key) < client.hparams["stale_probability"]
    sent = _split(report, late)
    return report._replace(update=sent, buffers=(), statistics=())

  def unit_of(server: PyTree, hparams: HParams) -> Array:
    """Return `Algorithm.log_weight`, or 0; shape=(), float32."""
    if algorithm.log_weight is None:
      return jnp.zeros((), jnp.float32)
    return jnp.asarray(algorithm.log_weight(server, hparams), jnp.float32)

  def init(server: PyTree, key: Key, hparams: HParams) -> StaleState:
    del key
    report = report_shapes(algorithm, server, hparams)
    weight = jnp.zeros((), jnp.float32)
    nothing = zeros_accumulator(_contents(report, weight))
    return StaleState(server, nothing, unit_of(server, hparams))

  def apply(
    state: StaleState, aggregate: Aggregate, context: Context
  ) -> StaleState:
    unit = unit_of(state.server, context.hparams)
    # The mean of what is 0 for some clients, times everybody's weight.
    sums = jax.tree.map(
      lambda x: x * aggregate.weight.astype(x.dtype), aggregate.update
    )
    arrived = _joined(sums.now, state.late, state.log_weight - unit)
    some = arrived.weight > 0
    count = jnp.where(some, arrived.weight, 1)
    mean = jax.tree.map(lambda x: x / count.astype(x.dtype), arrived)
    server = algorithm.apply(
      state.server,
      aggregate._replace(
        update=mean.update,
        buffers=mean.buffers,
        statistics=mean.statistics,
        weight=arrived.weight,
      ),
      context,
    )
    pick = lambda new, old: jnp.where(some, new, old)
    late = jax.tree.map(lambda x, y: x.astype(y.dtype), sums.late, state.late)
    return StaleState(jax.tree.map(pick, server, state.server), late, unit)

  wrapped = wrap_algorithm(
    algorithm,
    init=init,
    postprocess_report=postprocess_report,
    apply=apply,
    hparams={"stale_probability": chance},
    requirements=algorithm.requirements._replace(weighted_mean=True),
  )
  return wrapped._replace(log_weight=None)


def _check(algorithm: Algorithm, probability: float) -> None:
  """Refuse an algorithm that late reports do not go with.

  Raises:
    ValueError: it wants a stack, or is private.
  """
  if algorithm.requirements.all_updates:
    raise ValueError(
      f"server.stale_probability={probability} needs sums, and algorithm.name"
      " wants every update by itself; set it to None, or take another"
      " algorithm."
    )
  if algorithm.privacy is not None:
    raise ValueError(
      f"server.stale_probability={probability}: a late report can meet its"
      " client's next one in a sum, which then moves farther than"
      " privacy.central counts on; unset one of them."
    )


def _contents(report: Report, weight: Array) -> Sums:
  """Return what a report adds to a sum, of which its weight is a part."""
  return Sums(report.update, report.buffers, report.statistics, weight)


def _split(report: Report, late: Array) -> _Sent:
  """Return a report as part of the round's sum, or of the next round's.

  Args:
    report: of a client.
    late: shape=(), bool.
  """
  whole = _contents(report, jnp.ones((), jnp.float32))
  nothing = jax.tree.map(jnp.zeros_like, whole)
  pick = lambda a, b: jax.tree.map(lambda x, y: jnp.where(late, x, y), a, b)
  return _Sent(now=pick(nothing, whole), late=pick(whole, nothing))


def _joined(now: Sums, late: Sums, gap: Array) -> Sums:
  """Return the sum of what is in time and what is a round late.

  Args:
    now: in the unit of weights of this round.
    late: in that of the round before.
    gap: shape=(), float32; the logarithm of that unit over this one.
  """
  # Bounded: nothing late, times infinity, would not be nothing.
  worth = jnp.exp(jnp.clip(gap, -MOST_EXPONENT, MOST_EXPONENT))
  return jax.tree.map(
    lambda x, y: x + (y * worth.astype(y.dtype)).astype(x.dtype), now, late
  )
