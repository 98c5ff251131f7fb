"""FedLAW: aggregation weights learned on the server's own examples.

Li et al. 2023, "Revisiting weighted aggregation in federated learning with
neural networks" (arXiv 2302.10911), without the shrinking factor gamma. The
server searches for the weights lambda of the cohort's updates u_i that minimize
the loss L(x + sum_i lambda_i u_i) on its proxy examples, by gradient descent
through the aggregation: dL/dlambda_i = <grad L, u_i>.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fedjax_sim import core
from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Context,
  Requirements,
  Task,
  Variables,
  validate,
)
from fedjax_sim.engine.client_log import combine
from fedjax_sim.engine.client_loop import random_batch
from fedjax_sim.training.optimizers import Optimizer

ABSENT = -1e9  # a logit; finite, as gradients of 0 * inf are not


def fedlaw(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weight_steps: int = 20,
  weight_rate: float = 0.3,
  kl_weight: float = 0.2,
  server_batch_size: int = 128,
) -> Algorithm:
  """Return FedAvg whose aggregation weights are learned anew in every round.

  Needs `Context.server_data` and the aggregator `stack`.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    server_optimizer: takes the negative weighted mean update as a gradient;
      the weights are learned as for sgd with rate 1.
    weight_steps: steps of Adam on the weights' logits, which start at the
      logarithm of the clients' numbers of examples.
    weight_rate: Adam's learning rate.
    kl_weight: factor of the Kullback-Leibler divergence from the initial
      weights, which is added to the loss. Without it the weights overfit the
      server's examples, of which there are few. It is not in the paper.
    server_batch_size: number of the server's examples in a step; all of them
      if there are no more.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  validate.integer("weight_steps", weight_steps)
  validate.integer("server_batch_size", server_batch_size)
  rate = validate.number("weight_rate", weight_rate, ge=0)
  pull = validate.number("kl_weight", kl_weight, ge=0)
  base = fedavg(task, client_optimizer, server_optimizer)

  def learn(
    variables: Variables, aggregate: Aggregate, context: Context
  ) -> Array:
    """Return the cohort's weights, shape=(slots,)."""
    members = aggregate.members
    examples = context.server_data
    assert examples is not None

    def loss(logits: Array, key: Array) -> Array:
      chosen, own = jax.random.split(key)
      batch = random_batch(examples, server_batch_size, chosen)
      mean = combine(aggregate.update, weights_of(logits))
      params = jax.tree.map(
        lambda p, u: p + u.astype(p.dtype), variables.params, mean
      )
      value, _ = core.mean_loss(
        task, variables._replace(params=params), batch, own
      )
      return value + context.hparams["kl_weight"] * divergence(logits)

    def divergence(logits: Array) -> Array:
      log = jax.nn.log_softmax(masked(logits))
      return jnp.sum(jnp.exp(log) * (log - jax.nn.log_softmax(masked(first))))

    def masked(logits: Array) -> Array:
      return jnp.where(members.present, logits, ABSENT)

    def weights_of(logits: Array) -> Array:
      return jax.nn.softmax(masked(logits))

    adam = optax.adam(context.hparams["weight_rate"])

    def step(
      i: Array, carry: tuple[Array, optax.OptState]
    ) -> tuple[Array, optax.OptState]:
      logits, state = carry
      gradient = jax.grad(loss)(logits, jax.random.fold_in(context.key, i))
      updates, state = adam.update(gradient, state)
      return logits + updates.astype(logits.dtype), state

    first = jnp.log(jnp.where(members.weight > 0, members.weight, 1e-30))
    logits, _ = lax.fori_loop(0, weight_steps, step, (first, adam.init(first)))
    return weights_of(logits)

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    weights = learn(server.variables, aggregate, context)
    joined = combine(aggregate.update, weights)
    return base.apply(server, aggregate._replace(update=joined), context)

  return base._replace(
    apply=apply,
    hparams={**base.hparams, "weight_rate": rate, "kl_weight": pull},
    requirements=Requirements(all_updates=True, server_data=True),
  )
