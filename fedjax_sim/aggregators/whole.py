"""An aggregate of given updates, as a pure function, without a round."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  HParams,
  Key,
  PyTree,
  Shares,
)


def aggregate(
  aggregator: Aggregator,
  stack: PyTree,
  present: Array | None = None,
  weights: Array | None = None,
  *,
  hparams: HParams | None = None,
  key: Key | None = None,
  noise_key: Key | None = None,
  rank: Array | None = None,
  previous: PyTree = (),
  shares: Shares | None = None,
  byzantine: Array | None = None,
) -> PyTree:
  """Return what an aggregator makes of updates.

  A pure function of arrays, on one device: it can be jitted, mapped and
  differentiated in the updates, as adaptive attacks do.

  Args:
    aggregator: any, but of secure aggregation, whose randomness is a round's.
    stack: updates, leaves (clients, ...).
    present: shape=(clients,), bool; rows of others may hold anything. None for
      all.
    weights: shape=(clients,), floats; None for ones.
    hparams: numbers instead of the aggregator's own, all of them.
    key: what it draws random numbers from.
    noise_key: what it draws private noise from; None for `key`.
    rank: shape=(clients,), int32; by what random numbers and ties go; None for
      the order of the rows.
    previous: the last aggregate, for those that keep it; () for zeros.
    shares: how the coordinates are dealt, where this is called for a share;
      None where all are here.
    byzantine: shape=(clients,), bool; whose rows an attack replaces, where the
      aggregator is under one; None for nobody's.

  Returns:
    Leaves (...), as `Aggregator.finish` returns them.

  Example:
    attacked = lambda own: aggregate(krum(f=1), jnp.stack([*honest, own]))
    jax.jacobian(attacked)(own)
  """
  rows = len(jax.tree.leaves(stack)[0])
  key = jax.random.key(0) if key is None else key
  present = jnp.ones(rows, bool) if present is None else present
  weights = jnp.ones(rows, jnp.float32) if weights is None else weights
  ranks = jnp.arange(rows, dtype=jnp.int32) if rank is None else rank
  numbers = aggregator.hparams if hparams is None else hparams
  context = AggregationContext(
    key=key,
    noise_key=key if noise_key is None else noise_key,
    slot=jnp.zeros((), jnp.int32),
    rank=ranks,
    cohort_size=jnp.asarray(rows, jnp.int32),
    hparams=jax.tree.map(jnp.asarray, dict(numbers)),
    previous=previous,
    shares=shares or Shares(),
    byzantine=jnp.zeros(rows, bool) if byzantine is None else byzantine,
  )
  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack
  )
  acc = aggregator.init(one, rows)
  acc = aggregator.add(acc, stack, weights, present, context)
  count = jnp.sum(present, dtype=jnp.int32)
  weight = jnp.sum(jnp.where(present, weights, 0))
  return aggregator.finish(acc, weight, count, context)
