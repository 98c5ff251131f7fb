"""FLTrust: clients count by how far they agree with the server's own update.

Cao et al. 2021, "FLTrust: Byzantine-robust federated learning via trust
bootstrapping" (NDSS; arXiv 2012.13995). The server trains on examples of its
own, as clients do, and has the update g_0. With the trust scores TS_i =
max(cos(g_i, g_0), 0) the global update is

    g = sum_i TS_i (||g_0|| / ||g_i||) g_i / sum_i TS_i

It needs no bound on the number of attackers, but examples of the server's own
that are like the clients': there may be few, 100 in the paper.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  PyTree,
  Requirements,
  Task,
  validate,
)
from fedjax_sim.core.tree import clip_to_unit_norm, tree_norm
from fedjax_sim.engine.client_log import combine
from fedjax_sim.engine.client_loop import random_batch
from fedjax_sim.training.optimizers import Optimizer


def fltrust(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  server_steps: int = 1,
  server_batch_size: int = 32,
) -> Algorithm:
  """Return FedAvg whose clients are trusted as far as the server agrees.

  Needs `Context.server_data` and the aggregator `stack`. Numbers of examples
  count nothing. A round in which nobody is trusted has an update of 0.

  Args:
    task: what clients and server train.
    client_optimizer: starts anew in every round; the server's own training
      takes it, too.
    server_optimizer: takes the negative global update as a gradient; sgd,
      whose learning rate is the paper's alpha.
    server_steps: local steps of the server, the paper's R_l. The global update
      is as long as what they make, so take about as many as clients do.
    server_batch_size: number of the server's examples in a step; all of them
      if there are no more.

  Raises:
    TypeError, ValueError: a number is not whole and >= 1.
  """
  validate.integer("server_steps", server_steps)
  validate.integer("server_batch_size", server_batch_size)
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")
  (training,) = base.passes

  def own_update(server: ServerState, context: Context) -> PyTree:
    """Return what the server's own training adds to the parameters."""
    examples = context.server_data
    assert examples is not None
    size = min(server_batch_size, len(next(iter(examples.values()))))
    client = Client(
      message=base.broadcast(server),
      state=(),
      hparams=context.hparams,
      id=jnp.asarray(-1, jnp.int32),
      version=jnp.zeros((), jnp.int32),
      num_examples=jnp.asarray(size, jnp.int32),
      num_steps=jnp.full((1,), server_steps, jnp.int32),
      round=context.round,
      key=context.key,
      noise_key=context.noise_key,
    )

    def step(i: Array, carry: PyTree) -> PyTree:
      chosen, own = jax.random.split(jax.random.fold_in(context.key, i))
      batch = random_batch(examples, server_batch_size, chosen)
      return training.step(client, carry, batch, own)

    carry = lax.fori_loop(0, server_steps, step, training.start(client))
    return base.finish(client, carry).update

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    own = own_update(server, context)
    unit = lambda update: clip_to_unit_norm(update, 0.0)
    updates, direction = jax.vmap(unit)(aggregate.update), unit(own)
    cosine = sum(
      jnp.tensordot(u, d, d.ndim)
      for u, d in zip(
        jax.tree.leaves(updates), jax.tree.leaves(direction), strict=True
      )
    )
    trust = jnp.where(aggregate.members.present, jnp.maximum(cosine, 0), 0)
    joined = jax.tree.map(lambda u: tree_norm(own) * u, combine(updates, trust))
    return base.apply(server, aggregate._replace(update=joined), context)

  return base._replace(
    apply=apply,
    requirements=Requirements(all_updates=True, server_data=True),
  )
