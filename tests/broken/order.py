"""An aggregator that depends on the order in which clients are added."""

import jax
import jax.numpy as jnp

from fedjax_sim.core import Aggregator


def latest(rate: float = 0.5) -> Aggregator:
  """A moving average: each wave counts more than those before."""

  def add(acc, updates, weights, present, context):
    del weights
    share = jnp.where(present, context.hparams["rate"], 0.0)

    def move(a, u):
      for i in range(len(share)):  # lane after lane
        row = jnp.where(present[i], u[i], 0)
        a = (1 - share[i]) * a + share[i] * row
      return a

    return jax.tree.map(move, acc, updates)

  return Aggregator(
    init=lambda update, capacity: jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), update
    ),
    add=add,
    finish=lambda acc, weight, count, context: acc,
    hparams={"rate": rate},
  )
