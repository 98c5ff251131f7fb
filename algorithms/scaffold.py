"""SCAFFOLD: control variates correct the drift of clients' local steps.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic controlled averaging for
federated learning" (arXiv 1910.06378), algorithm 1, whose lines are cited. The
server keeps a control variate c and client i keeps c_i; all start at 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms import fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Client,
  Context,
  HParams,
  Key,
  PyTree,
  Report,
  Requirements,
  Task,
  Variables,
  validate,
)
from fedjax_sim.core.tree import tree_where, zeros_accumulator
from fedjax_sim.training.local import LocalState, full_gradient
from fedjax_sim.training.optimizers import Optimizer, check_sgd


class ServerState(NamedTuple):
  """FedAvg's state, with x in it, and c."""

  fedavg: fedavg.ServerState
  c: PyTree


class Message(NamedTuple):
  """What the server sends (line 5)."""

  x: Variables
  c: PyTree


def scaffold(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  option: str = "II",
) -> Algorithm:
  """Return FedAvg whose local steps are corrected by control variates.

  All clients count the same, as in the paper.

  Args:
    task: what clients train.
    client_optimizer: sgd without momentum; its learning rate is eta_l.
    server_optimizer: sgd; its learning rate is eta_g.
    option: how a client renews c_i (line 12). "I": the gradient over all of its
      examples at x, which takes one more pass. "II": the mean of its local
      gradients.

  Raises:
    UnknownNameError: no such option.
    ValueError: option II with a client optimizer other than plain sgd.
  """
  validate.one_of("option", option, ("I", "II"))
  if option == "II":  # else x - y_i is no sum of gradients
    check_sgd("client_optimizer", client_optimizer, "weight_decay")
  get_model = lambda client: client.message.x
  at_x = full_gradient(task, get_model=get_model)

  def corrected(client: Client, params: PyTree, gradient: PyTree) -> PyTree:
    return jax.tree.map(  # line 10
      lambda g, c_i, c: g + (c - c_i).astype(g.dtype),
      gradient,
      client.state,
      client.message.c,
    )

  base = fedavg.fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting="uniform",
    gradient_hook=corrected,
    get_model=get_model,
  )

  def init(key: Key, hparams: HParams) -> ServerState:
    server = base.init(key, hparams)
    return ServerState(server, zeros_accumulator(server.variables.params))

  def finish(client: Client, *carries: LocalState) -> Report:
    report = base.finish(client, carries[-1])
    if option == "I":
      minus_g = at_x.finish(client, carries[0]).update
      renewed = jax.tree.map(
        lambda u, c: -u.astype(c.dtype), minus_g, client.state
      )
    else:
      rate = client.hparams["client"]["learning_rate"]
      k_eta = client.num_steps[-1] * rate
      # Divided by 1 first, as 1 / 0 has no derivative.
      inverse = jnp.where(k_eta > 0, 1 / jnp.where(k_eta > 0, k_eta, 1), 0)
      renewed = jax.tree.map(
        lambda c_i, c, u: c_i - c - inverse.astype(c.dtype) * u.astype(c.dtype),
        client.state,
        client.message.c,
        report.update,
      )
      # Steps of length 0, as at the end of a schedule, say nothing.
      renewed = tree_where(k_eta > 0, renewed, client.state)
    change = jax.tree.map(jnp.subtract, renewed, client.state)
    return report._replace(statistics=change, state=renewed)  # lines 13 and 14

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    share = aggregate.clients / context.num_clients  # line 17
    c = jax.tree.map(
      lambda c, change: c + share.astype(c.dtype) * change.astype(c.dtype),
      server.c,
      aggregate.statistics,
    )
    return ServerState(base.apply(server.fedavg, aggregate, context), c)

  return base._replace(
    init=init,
    broadcast=lambda server: Message(server.fedavg.variables, server.c),
    passes=(at_x.local_pass, *base.passes) if option == "I" else base.passes,
    finish=finish,
    apply=apply,
    variables=lambda server: server.fedavg.variables,
    with_model=lambda server, variables: server._replace(
      fedavg=server.fedavg._replace(variables=variables)
    ),
    client_init=lambda server, hparams: jax.tree.map(jnp.zeros_like, server.c),
    requirements=Requirements(own_weights=True),  # c is the mean of the c_i
  )
