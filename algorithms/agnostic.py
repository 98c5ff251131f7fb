"""Agnostic federated learning: a model for the worst mixture of the clients.

Mohri et al. 2019, "Agnostic federated learning" (arXiv 1902.00146), algorithm
Stochastic-AFL, with every client as a domain:

    min_w max_lambda sum_k lambda_k L_k(w),    lambda in the simplex

A round descends in w and ascends in lambda, both from where the other one was,
and projects lambda onto the simplex. w moves by local steps where the paper
takes one gradient. Of N clients a cohort of S stands for all: its terms count
N / S times, which leaves both gradients unbiased if every client is as likely
to be drawn. The paper returns the mean of all w, this the last one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms import fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  HParams,
  Key,
  Report,
  Requirements,
  Task,
  Variables,
  validate,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.core.tree import tree_where
from fedjax_sim.training.local import LocalState, full_loss, mean_of
from fedjax_sim.training.optimizers import Optimizer


class ServerState(NamedTuple):
  """FedAvg's state, with w in it, and the mixture."""

  fedavg: fedavg.ServerState
  lam: Array  # shape=(num_clients,), float32; >= 0, its sum is 1


class Message(NamedTuple):
  """What the server sends: of lambda, to each client its own lambda_k alone."""

  variables: Variables
  lam: Array


def agnostic(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  num_clients: int,
  *,
  lambda_rate: float = 0.01,
) -> Algorithm:
  """Return FedAvg whose clients are weighted so that the worst mixture counts.

  A client measures its loss L_k at the received model in a pass of its own, and
  reports it by itself, which no private run allows.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    server_optimizer: sgd with learning rate 1 takes the mixture's update.
    num_clients: N, the population; a config knows it.
    lambda_rate: step size of the ascent in lambda, >= 0; with 0 all clients
      count the same.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  count = validate.integer("num_clients", num_clients)
  lambda_rate = validate.number("lambda_rate", lambda_rate, ge=0)
  get_model = lambda client: client.message.variables
  base = fedavg.fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting="uniform",
    get_model=get_model,
  )

  def init(key: Key, hparams: HParams) -> ServerState:
    even = jnp.full((count,), 1 / count, jnp.float32)
    return ServerState(base.init(key, hparams), even)

  def finish(client: Client, measured: Total, carry: LocalState) -> Report:
    return base.finish(client, carry)._replace(
      weight=count * client.message.lam, values={"loss": mean_of(measured)}
    )

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    if context.num_clients != count:
      raise ValueError(
        f"num_clients={count}, and the run has {context.num_clients:,} clients;"
        " give as many."
      )
    # N / S sum_k lambda_k u_k, in place of the mean by lambda.
    total = aggregate.weight / jnp.maximum(aggregate.clients, 1)
    buffers = server.fedavg.variables.buffers
    moved = aggregate._replace(
      update=jax.tree.map(
        lambda u: total.astype(u.dtype) * u, aggregate.update
      ),
      # Clients that count nothing say nothing about buffers.
      buffers=tree_where(
        total > 0,
        aggregate.buffers,
        jax.tree.map(
          lambda b, m: b.astype(m.dtype), buffers, aggregate.buffers
        ),
      ),
    )
    lam = _ascended(server.lam, aggregate, context.hparams["lambda_rate"])
    return ServerState(base.apply(server.fedavg, moved, context), lam)

  return base._replace(
    init=init,
    broadcast=lambda server: Message(server.fedavg.variables, server.lam),
    download=lambda message, version, ident: message._replace(
      lam=message.lam[ident]
    ),
    passes=(full_loss(task, get_model=get_model), *base.passes),
    finish=finish,
    apply=apply,
    variables=lambda server: server.fedavg.variables,
    with_model=lambda server, variables: server._replace(
      fedavg=server.fedavg._replace(variables=variables)
    ),
    hparams={**base.hparams, "lambda_rate": lambda_rate},
    requirements=Requirements(weighted_mean=True, client_values=True),
    state_metrics=lambda server, hparams: {"lambda/max": server.lam.max()},
  )


def _ascended(lam: Array, aggregate: Aggregate, rate: Array) -> Array:
  """Return lambda after a step along the cohort's losses."""
  members = aggregate.members
  share = lam.size / jnp.maximum(aggregate.clients, 1)
  # No id is N, so what is absent is dropped.
  place = jnp.where(members.present, members.id, lam.size)
  step = rate * share * members.values["loss"]
  return projected(lam.at[place].add(step.astype(lam.dtype), mode="drop"))


def projected(v: Array) -> Array:
  """Return the point of the simplex that is nearest to v, shape=(n,).

  It is max(v - theta, 0), with theta from the largest entries of v (Duchi et
  al. 2008, "Efficient projections onto the l1-ball").
  """
  largest = jnp.sort(v)[::-1]
  over = jnp.cumsum(largest) - 1
  thetas = over / jnp.arange(1, v.size + 1)
  kept = jnp.sum(largest > thetas)
  return jnp.maximum(v - thetas[kept - 1], 0)
