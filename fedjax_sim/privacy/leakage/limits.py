"""Clients that report too much of something are left out of the round.

A client compares a value that it reports with a threshold and, beyond it, sends
an update of 0 with weight 0. The server may let the threshold follow a quantile
of what the round's clients reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
  Metric,
  PyTree,
  Report,
)
from fedjax_sim.training.seal import check_open
from fedjax_sim.training.wrappers import wrap_algorithm

HPARAMS = "limits"  # the section of the thresholds


class LimitedState(NamedTuple):
  """A server, and how much clients may report in the next round.

  Attributes:
    server: the algorithm's.
    adapted: value -> threshold, shape=(), float32; of those that adapt.
  """

  server: PyTree
  adapted: dict[str, Array]


class Message(NamedTuple):
  """What the server sends to every client."""

  inner: PyTree
  adapted: dict[str, Array]


def limited(
  algorithm: Algorithm,
  thresholds: Mapping[str, float],
  quantiles: Mapping[str, float] = {},
) -> Algorithm:
  """Return the algorithm without clients that report more than a threshold.

  Each client has the value `left_out`, 0 or 1, and the round has their share as
  a metric.
  If all are left out, the server stays as it is.

  Args:
    algorithm: one that takes a weighted mean, or a stack.
    thresholds: name of a value in `Report.values` -> the most that it may be.
    quantiles: name -> q, for some of them: after each round its threshold
      becomes the q-quantile, interpolated as `numpy.quantile` does, of what
      clients reported, those left out included.

  Raises:
    ValueError: the algorithm is private already.
  """
  check_open(algorithm, "limited")

  def limits(hparams: HParams, adapted: dict[str, Array]) -> dict[str, Array]:
    return {**hparams[HPARAMS]["thresholds"], **adapted}

  def init(server: PyTree, key: Key, hparams: HParams) -> LimitedState:
    del key
    first = hparams[HPARAMS]["thresholds"]
    return LimitedState(
      server,
      {name: jnp.asarray(first[name], jnp.float32) for name in quantiles},
    )

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    report = inner(report)
    out = jnp.zeros((), bool)
    for name, most in limits(client.hparams, client.message.adapted).items():
      out |= report.values[name] > most
    share = out.astype(jnp.float32)
    return report._replace(
      update=jax.tree.map(
        lambda u: jnp.where(out, jnp.zeros_like(u), u), report.update
      ),
      weight=jnp.where(out, 0, report.weight),
      values={**report.values, "left_out": share},
      metrics={
        **report.metrics,
        "left_out": Metric(share, jnp.ones((), jnp.float32)),
      },
    )

  def apply(
    state: LimitedState, aggregate: Aggregate, context: Context
  ) -> LimitedState:
    members = aggregate.members
    out = members.values["left_out"] > 0
    kept = aggregate._replace(
      clients=aggregate.clients - jnp.sum(out, dtype=jnp.int32),
      members=members._replace(present=members.present & ~out),
    )
    server = algorithm.apply(state.server, kept, context)
    some = aggregate.weight > 0
    adapted = {}
    for name in quantiles:
      seen = jnp.where(members.present, members.values[name], jnp.nan)
      q = context.hparams[HPARAMS]["quantiles"][name]
      found = jnp.nanquantile(seen, q).astype(jnp.float32)
      # A private server sees nobody.
      adapted[name] = jnp.where(
        jnp.any(members.present), found, state.adapted[name]
      )
    return LimitedState(
      jax.tree.map(lambda a, b: jnp.where(some, a, b), server, state.server),
      adapted,
    )

  def state_metrics(state: LimitedState, hparams: HParams) -> dict[str, Array]:
    now = limits(hparams, state.adapted)
    return {f"{name}/threshold": most for name, most in now.items()}

  numbers = {"thresholds": dict(thresholds), "quantiles": dict(quantiles)}
  needs = algorithm.requirements
  return wrap_algorithm(
    algorithm,
    init=init,
    message=lambda state, inner: Message(inner, state.adapted),
    postprocess_report=postprocess_report,
    apply=apply,
    state_metrics=state_metrics,
    hparams={HPARAMS: numbers},
    requirements=needs._replace(
      weighted_mean=needs.weighted_mean or not needs.all_updates
    ),
  )
