"""Parts that draw random numbers where nobody expects them."""

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Aggregator, Algorithm, Transform, TransformResult


def _noisy(update, key):
  return jax.tree.map(
    lambda u: u + 0.1 * jax.random.normal(key, u.shape, u.dtype), update
  )


def constant() -> Transform:
  """Noise that is the same for all clients, in all rounds."""

  def apply(update, shared, state, hparams, key):
    key = jax.random.key(7)
    leaves, tree = jax.tree.flatten(update)
    keys = jax.random.split(key, len(leaves))
    noisy = [_noisy(u, k) for u, k in zip(leaves, keys, strict=True)]
    return TransformResult(jax.tree.unflatten(tree, noisy))

  return Transform(name="constant", hparams={}, apply=apply, adds_noise=True)


def one_key() -> Transform:
  """Noise of which all leaves get the same, and that nobody hears of."""

  def apply(update, shared, state, hparams, key):
    return TransformResult(_noisy(update, key))

  return Transform(name="one_key", hparams={}, apply=apply)


def by_round(task, client_optimizer, server_optimizer) -> Algorithm:
  """FedAvg in which all clients of a round get the same noise."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")

  def finish(client, carry):
    report = base.finish(client, carry)
    key = jax.random.fold_in(jax.random.key(1), client.round)
    return report._replace(update=_noisy(report.update, key))

  return base._replace(finish=finish)


def known(task, client_optimizer, server_optimizer) -> Algorithm:
  """FedAvg with private noise that has the same seed in every run."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")

  def apply(server, aggregate, context):
    update = _noisy(aggregate.update, context.noise_key)
    return base.apply(server, aggregate._replace(update=update), context)

  return base._replace(apply=apply)


def known_mean() -> Aggregator:
  """A mean with such noise."""

  def add(acc, updates, weights, present, context):
    shown = lambda u: jnp.where(present.reshape(-1, *(1,) * (u.ndim - 1)), u, 0)
    return jax.tree.map(lambda a, u: a + shown(u).sum(0), acc, updates)

  def finish(acc, weight, count, context):
    mean = jax.tree.map(lambda a: a / jnp.maximum(count, 1), acc)
    return _noisy(mean, context.noise_key)

  return Aggregator(
    init=lambda update, capacity: jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), update
    ),
    add=add,
    finish=finish,
  )
