"""Bucketing: robust aggregation of means over small random groups.

Karimireddy et al. 2022, "Byzantine-robust learning on heterogeneous datasets
via bucketing" (arXiv 2006.09365): clients are put in a random order and
averaged s at a time, and the means are aggregated. Means of honest clients
whose data differ are nearer to each other than the clients are, which other
aggregators count on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators import rows
from fedjax_sim.aggregators.registry import ROBUST
from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  PyTree,
  validate,
)


def bucketing(
  inner: str | Aggregator = "krum", size: int = 2, **options: Any
) -> Aggregator:
  """Return a robust aggregator of the means over random buckets of clients.

  f attackers spoil f buckets at most, so `inner` has to withstand f of
  ceil(n / size). A bucket's mean is plain, and its weight the sum of its
  clients'. The order is drawn anew in every round, from the round's key and
  the clients' ranks, so it depends on neither lanes nor devices. The last
  bucket may be smaller. Clients that are not present are in no bucket.

  Args:
    inner: the name of a robust aggregator, or one that keeps all updates.
    size: clients of a bucket, the paper's s, >= 1.
    **options: of `inner`, where that is a name.

  Raises:
    TypeError, ValueError: no such aggregator, one that sums, or a number that
      is out of range.

  Example:
    bucketing("multi_krum", size=2, f=1)
  """
  size = validate.integer("size", size)
  if isinstance(inner, str):
    inner = validate.lookup("inner", inner, ROBUST)(**options)
  elif options:
    raise TypeError(
      f"{next(iter(options))}: inner is made already; give its name, or make"
      " it with the option."
    )
  needed = (inner.min_clients - 1) * size + 1
  whole = inner._replace(min_clients=1)  # runs that differ in it share programs
  if not (whole.needs_all_updates and whole.finishes_shares and whole.reduces):
    raise ValueError(
      "inner is an aggregator that keeps no stack of updates to average; give"
      f" one of {', '.join(map(repr, ROBUST))}."
    )

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    stack, filled, weights = acc
    slots = len(filled)
    buckets = -(-slots // size)
    order = jnp.lexsort((context.rank, _drawn(context), ~filled))
    place = jnp.argsort(order)
    bucket = jnp.where(filled, place // size, buckets)
    total = lambda x: jax.ops.segment_sum(x, bucket, buckets + 1)[:-1]
    members = total(filled.astype(jnp.float32))
    wide = rows.matrices(stack, filled)

    def mean(s: Array) -> Array:
      n = jnp.maximum(members, 1).reshape((-1,) + (1,) * (s.ndim - 1))
      share = s / n.astype(s.dtype)[jnp.minimum(bucket, buckets - 1)]
      return total(share)

    own = total(jnp.where(filled, weights, 0))
    number = jnp.arange(buckets, dtype=jnp.int32)
    there = -(-count // size)
    one = jax.tree.map(lambda s: s[0], wide)
    inside = context._replace(
      key=jax.random.fold_in(context.key, 1),
      rank=number,
      slot=jnp.zeros_like(context.slot),
      cohort_size=there,
    )
    kept = whole.add(
      whole.init(one, buckets),
      jax.tree.map(mean, wide),
      own,
      members > 0,
      inside,
    )
    return whole.finish(kept, weight, there, inside)

  return Aggregator(
    rows.empty_rows,
    rows.put_rows,
    finish,
    needs_all_updates=True,
    by_shares=True,
    hparams=whole.hparams,
    differentiable=whole.differentiable,
    min_clients=needed,
  )


def _drawn(context: AggregationContext) -> Array:
  """Return a random number for every row, by its client's rank."""
  key = jax.random.fold_in(context.key, 0)
  of = lambda rank: jax.random.bits(jax.random.fold_in(key, rank))
  return jax.vmap(of)(context.rank)
