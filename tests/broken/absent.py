"""An aggregator that adds what clients send who are not present."""

import jax
import jax.numpy as jnp

from fedjax_sim.core import Aggregator


def hidden() -> Aggregator:
  """A mean whose absent rows are multiplied by 0, which keeps a NaN."""

  def add(acc, updates, weights, present, context):
    there = present.astype(jnp.float32)
    return jax.tree.map(
      lambda a, u: a + jnp.tensordot(there, u, 1), acc, updates
    )

  return Aggregator(
    init=lambda update, capacity: jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), update
    ),
    add=add,
    finish=lambda acc, weight, count, context: jax.tree.map(
      lambda a: a / jnp.maximum(count, 1), acc
    ),
  )


def by_cohort() -> Aggregator:
  """A mean that divides by all who were asked, whoever is present."""
  base = hidden()

  def add(acc, updates, weights, present, context):
    shown = lambda u: jnp.where(present.reshape(-1, *(1,) * (u.ndim - 1)), u, 0)
    updates = jax.tree.map(shown, updates)
    return base.add(acc, updates, weights, present, context)

  return base._replace(
    add=add,
    finish=lambda acc, weight, count, context: jax.tree.map(
      lambda a: a / jnp.maximum(context.cohort_size, 1), acc
    ),
  )


def boastful() -> Aggregator:
  """A plain mean that says that it is weighted."""
  return hidden()._replace(weighted_mean=True)
