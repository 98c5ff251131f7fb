"""An aggregator of one's own: the mean of the clients with short updates.

A trimmed mean by norm: the clients whose updates are longest are left out.

fedjax-sim run --config=docs/own/aggregator.py --workdir=runs/aggregator

Three clients in ten have random labels: test accuracy 0.94 after 50 rounds, and
0.92 with --config.aggregator.name=weighted_mean.
"""

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import Aggregator


def short_mean(fraction: float = 0.3) -> Aggregator:
  """Return the mean of all updates but the share with the largest norms.

  Needs every update at once, so it keeps a stack of them: (updates, leaves
  (slots, ...); which slots are filled, shape=(slots,), bool).
  """

  def init(update, capacity):  # of one client; the slots of this device
    rows = lambda x: jnp.zeros((capacity, *x.shape), x.dtype)
    return jax.tree.map(rows, update), jnp.zeros((capacity,), bool)

  def add(acc, updates, weights, present, context):  # leaves (lanes, ...)
    put = lambda rows, new: lax.dynamic_update_slice_in_dim(
      rows, new, context.slot, 0
    )
    return jax.tree.map(put, acc, (updates, present))

  def finish(acc, weight, count, context):  # `count` clients are there
    updates, filled = acc
    square = lambda x: jnp.sum(x**2, axis=range(1, x.ndim))
    norms = sum(square(x) for x in jax.tree.leaves(updates))
    place = jnp.argsort(jnp.argsort(jnp.where(filled, norms, jnp.inf)))
    left_out = jnp.floor(context.hparams["fraction"] * count)
    kept = count - left_out.astype(count.dtype)

    def mean(x):
      chosen = (place < kept).reshape(-1, *(1,) * (x.ndim - 1))
      return jnp.sum(jnp.where(chosen, x, 0), axis=0) / jnp.maximum(kept, 1)

    return jax.tree.map(mean, updates)

  return Aggregator(
    init,
    add,
    finish,
    needs_all_updates=True,
    hparams={"fraction": fraction},
  )


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.aggregator.name = f"{__file__}:short_mean"
  config.data.partition = "iid"
  config.data.random_label_clients = 0.3  # what it is to withstand
  config.client.batch_size = 4
  config.client.epochs = 5
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
