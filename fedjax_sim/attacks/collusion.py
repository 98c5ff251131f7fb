"""Aggregators of rounds in which attackers know what all others send.

The attacked aggregator keeps all updates of a round. In the rows of Byzantine
clients it writes the update that they agree on, a function of the honest rows,
and hands them all to the aggregator that is under attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators import rows
from fedjax_sim.attacks.attack import Attack, Honest, check_shapes
from fedjax_sim.core import AggregationContext, Aggregator, Array, PyTree
from fedjax_sim.core.tree import all_finite

_SECTION = "attack"  # of the hyper-parameters


def with_collusion(aggregator: Aggregator, attack: Attack) -> Aggregator:
  """Return the aggregator whose Byzantine rows hold what attackers agree on.

  Memory is cohort x parameters, over all devices. Where the attack goes by
  shares, and the aggregator as well or as a weighted mean, each device has all
  rows for a share of the coordinates; otherwise whole updates travel to every
  device. A round without honest clients, or without attackers, is as it was.

  Args:
    aggregator: the one that is under attack.
    attack: its `collude`; without one, the aggregator is returned as it is.

  Raises:
    ValueError: the attack needs what the aggregator does not have.
  """
  collude = attack.collude
  if collude is None:
    return aggregator
  inner = aggregator._replace(min_clients=1)  # runs that differ share programs
  _check(inner, attack)

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    stack, filled, weights = acc
    numbers = dict(context.hparams)
    own = numbers.pop(_SECTION)
    inside = context._replace(
      hparams=numbers, slot=jnp.zeros_like(context.slot)
    )
    honest = filled & ~context.byzantine
    replaced = filled & context.byzantine & jnp.any(honest)

    def aggregate(sent: PyTree) -> PyTree:
      sent = jax.tree.map(lambda x, s: x.astype(s.dtype), sent, stack)
      put = lambda s, x: jnp.where(_column(replaced, s), x, s)
      attacked = jax.tree.map(put, stack, sent)
      one = jax.tree.map(lambda s: s[0], stack)
      # As any client whose update is not finite, they are left out.
      bad = context.shares.max((~all_finite(sent)).astype(jnp.int32)) > 0
      wrong = replaced & bad
      there = filled & ~wrong
      kept = inner.add(
        inner.init(one, len(filled)), attacked, weights, there, inside
      )
      return inner.finish(
        kept,
        weight - jnp.sum(jnp.where(wrong, weights, 0)),
        count - jnp.sum(wrong, dtype=count.dtype),
        inside,
      )

    wide = rows.matrices(stack, honest)
    seen = Honest(
      rows=wide,
      present=honest,
      clients=jnp.maximum(jnp.sum(honest, dtype=jnp.int32), 1),
      attackers=jnp.sum(replaced, dtype=jnp.int32),
      mean=rows.mean_of(wide, honest.astype(jnp.float32)),
      shares=context.shares,
      aggregate=aggregate,
    )
    sent = collude(seen, own)
    check_shapes("collude", sent, seen.mean)
    return aggregate(sent)

  return Aggregator(
    rows.empty_rows,
    rows.put_rows,
    finish,
    needs_all_updates=True,
    by_shares=attack.by_shares
    and (inner.finishes_shares or inner.weighted_mean),
    reduces=inner.reduces,
    hparams={**inner.hparams, _SECTION: dict(attack.hparams)},
    differentiable=False,
    keeps_previous=inner.keeps_previous,
    min_clients=aggregator.min_clients,
  )


def _check(aggregator: Aggregator, attack: Attack) -> None:
  """Refuse an aggregator that this attack does not go with."""
  if _SECTION in aggregator.hparams:
    raise ValueError(
      f"Aggregator.hparams has a {_SECTION!r} already, which an attack would"
      " replace; rename it, or attack only once."
    )
  if aggregator.draws_noise:
    raise ValueError(
      "attack.name lets attackers see what every client sends, and"
      " aggregator.name lets nobody see more than a noisy sum; take an attack"
      " on data, or on a client's own report."
    )
  if attack.asks_aggregate and not (
    aggregator.reduces and aggregator.differentiable
  ):
    raise ValueError(
      "attack.name follows the derivative of what aggregator.name returns, and"
      " it returns no update, or one without a derivative; take another one of"
      " the two."
    )


def deviations(honest: Honest) -> PyTree:
  """Return the honest rows less their mean, 0 in all other rows."""
  less = lambda s, m: jnp.where(
    _column(honest.present, s), s - m[None].astype(s.dtype), 0
  )
  return jax.tree.map(less, honest.rows, honest.mean)


def standard_deviation(honest: Honest) -> PyTree:
  """Return each coordinate's standard deviation over the honest updates."""

  def of(s: Array) -> Array:
    largest = jnp.max(jnp.abs(s), axis=0)
    unit = jnp.where(largest > 0, largest, 1)[None]  # or squares may overflow
    return unit[0] * jnp.sqrt(jnp.sum((s / unit) ** 2, axis=0) / honest.clients)

  return jax.tree.map(of, deviations(honest))


def norm(update: PyTree, honest: Honest) -> Array:
  """Return the L2 norm of an update, shape=(), without a derivative at 0."""
  return rows.norms(jax.tree.map(lambda x: x[None], update), honest.shares)[0]


def scaled(update: PyTree, factor: Array) -> PyTree:
  """Return the update times a number."""
  return jax.tree.map(lambda x: x * factor.astype(x.dtype), update)


def plus(update: PyTree, other: PyTree) -> PyTree:
  """Return the sum of two updates."""
  return jax.tree.map(lambda x, y: x + y.astype(x.dtype), update, other)


def directions(honest: Honest) -> Mapping[str, PyTree]:
  """Return the directions in which attackers move the mean, by name.

  "unit" goes against the honest mean, "std" against each coordinate's standard
  deviation, "sign" against the mean's signs. They have no particular length.
  """
  against = lambda tree: jax.tree.map(jnp.negative, tree)
  return {
    "unit": against(honest.mean),
    "std": against(standard_deviation(honest)),
    "sign": against(jax.tree.map(jnp.sign, honest.mean)),
  }


def _column(mask: Array, like: Any) -> Array:
  """Return a mask of rows that broadcasts to a stacked leaf."""
  return mask.reshape((-1,) + (1,) * (like.ndim - 1))
