"""One aggregate for every group of clients, by any aggregator.

For algorithms that keep several models: of edge servers, or of clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import AggregationContext, Aggregator, Array, PyTree


class Grouped(NamedTuple):
  """An update, and the group that it belongs to.

  Attributes:
    update: of one client; after aggregation, leaves (groups, ...).
    group: shape=(), int32; after aggregation shape=(groups,), float32, the sum
      of the weights of each group's clients.
  """

  update: PyTree
  group: Array


class _Sums(NamedTuple):
  """The accumulator of every group; with its weights and clients counted."""

  acc: PyTree  # leaves (groups, ...)
  weight: Array  # shape=(groups,), float32
  clients: Array  # shape=(groups,), int32


def grouped(aggregator: Aggregator, groups: int) -> Aggregator:
  """Return an aggregator of `Grouped` updates, each group by itself.

  The aggregate of a group without clients is what the aggregator makes of
  nobody, a mean of 0.

  Args:
    aggregator: one that sums, such as `weighted_mean`.
    groups: number of groups; a client's is below it. With 1 the result is the
      aggregator itself, of plain updates.

  Raises:
    ValueError: an aggregator that keeps all updates, or its last result.
  """
  if groups == 1:
    return aggregator
  if aggregator.needs_all_updates or aggregator.keeps_previous:
    raise ValueError(
      "aggregator.name keeps all updates, or its last result, and"
      " algorithm.name has several groups of clients, each with an aggregate of"
      " its own; take 'weighted_mean' or 'mean'."
    )
  every = jnp.arange(groups, dtype=jnp.int32)

  def init(update: Grouped, capacity: int) -> _Sums:
    acc = aggregator.init(update.update, capacity)
    repeat = lambda x: jnp.broadcast_to(x, (groups, *jnp.shape(x)))
    return _Sums(
      jax.tree.map(repeat, acc),
      jnp.zeros((groups,), jnp.float32),
      jnp.zeros((groups,), jnp.int32),
    )

  def add(
    sums: _Sums,
    updates: Grouped,
    weights: Array,
    present: Array,
    context: AggregationContext,
  ) -> _Sums:
    def one(group: Array, acc: PyTree) -> tuple[PyTree, Array, Array]:
      mine = present & (updates.group == group)
      acc = aggregator.add(acc, updates.update, weights, mine, context)
      weight = jnp.sum(jnp.where(mine, weights, 0))
      return acc, weight, jnp.sum(mine, dtype=jnp.int32)

    acc, weight, count = jax.vmap(one)(every, sums.acc)
    return _Sums(acc, sums.weight + weight, sums.clients + count)

  def finish(
    sums: _Sums, weight: Array, count: Array, context: AggregationContext
  ) -> Grouped:
    del weight, count

    def one(acc: PyTree, weight: Array, count: Array) -> PyTree:
      return aggregator.finish(acc, weight, count, context)

    update = jax.vmap(one)(sums.acc, sums.weight, sums.clients)
    return Grouped(update, sums.weight)

  return aggregator._replace(init=init, add=add, finish=finish, reduces=False)
