"""MimeLite: clients take the steps of a centralized optimizer.

Karimireddy et al. 2020, "Mime: Mimicking centralized stochastic algorithms in
federated learning" (arXiv 2008.03606), algorithm 1 in its variant MimeLite. A
base optimizer has a step U and an update V of its state s. In their local steps
clients apply U with the server's s, which stays as it is:

    y_i <- y_i - eta U(g_i(y_i), s)

and the server renews s by the mean of the clients' full gradients at x:

    s <- V(1 / |S| sum grad f_i(x), s)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

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
  Task,
  Variables,
  in_float32,
)
from fedjax_sim.training.local import (
  GradientHook,
  LocalState,
  full_gradient,
)
from fedjax_sim.training.optimizers import Optimizer, descend


class ServerState(NamedTuple):
  """FedAvg's state, with x in it, and the base optimizer's state s."""

  fedavg: fedavg.ServerState
  s: PyTree


class Message(NamedTuple):
  """What the server sends to clients."""

  x: Variables
  s: PyTree


def mime_lite(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str = "uniform",
) -> Algorithm:
  """Return FedAvg whose clients use the server's optimizer state.

  Args:
    task: what clients train.
    client_optimizer: the base optimizer, such as sgd with momentum, or adam. As
      optax scales momentum, m <- g + beta m, eta is 1 / (1 - beta) times the
      learning rate.
    server_optimizer: sgd with learning rate 1 takes the mean of the y_i, as in
      the paper.
    weighting: as in `fedavg`; the paper's is `uniform`.
  """
  at_x = full_gradient(task, weighting=weighting, get_model=get_x)
  base = mimicking(
    task,
    client_optimizer,
    server_optimizer,
    weighting=weighting,
    hook=lambda client, params, gradient: gradient,
    mean_gradient=lambda aggregate, context: jax.tree.map(
      jnp.negative, aggregate.statistics
    ),
  )

  def finish(client: Client, full: LocalState, trained: LocalState) -> Report:
    minus_gradient = in_float32(at_x.finish(client, full).update)
    return base.finish(client, trained)._replace(statistics=minus_gradient)

  return base._replace(passes=(at_x.local_pass, *base.passes), finish=finish)


def get_x(client: Client) -> Variables:
  """Return the model of a client's message."""
  x: Variables = client.message.x
  return x


def mimicking(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str,
  hook: GradientHook,
  mean_gradient: Callable[[Aggregate, Context], PyTree],
) -> Algorithm:
  """Return what Mime and MimeLite have in common.

  Args:
    task: as in `mime_lite`.
    client_optimizer: the base optimizer.
    server_optimizer: as in `mime_lite`.
    weighting: as in `fedavg`.
    hook: (client, params, gradient) -> gradient that U is applied to.
    mean_gradient: (aggregate, context) -> the mean of the clients' gradients at
      x.
  """
  base_step = client_optimizer.build

  def mimic(client: Client, params: PyTree, gradient: PyTree) -> PyTree:
    """Return -eta U(g, s), the change of the parameters."""
    base = base_step(client.hparams["client"])
    gradient = hook(client, params, gradient)
    change, _ = base.update(gradient, client.message.s, params)
    return change

  # What `mimic` returns is the step already.
  added = Optimizer(lambda hparams: optax.identity(), client_optimizer.hparams)
  base = fedavg.fedavg(
    task,
    added,
    server_optimizer,
    weighting=weighting,
    gradient_hook=mimic,
    get_model=get_x,
  )

  def init(key: Key, hparams: HParams) -> ServerState:
    server = base.init(key, hparams)
    s = base_step(hparams["client"]).init(server.variables.params)
    return ServerState(server, s)

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    params = server.fedavg.variables.params
    gradient = jax.tree.map(
      lambda g, p: g.astype(p.dtype), mean_gradient(aggregate, context), params
    )
    optimizer = base_step(context.hparams["client"])
    _, s = descend(optimizer, gradient, server.s, params)
    return ServerState(base.apply(server.fedavg, aggregate, context), s)

  return base._replace(
    init=init,
    broadcast=lambda server: Message(server.fedavg.variables, server.s),
    apply=apply,
    variables=lambda server: server.fedavg.variables,
    with_model=lambda server, variables: server._replace(
      fedavg=server.fedavg._replace(variables=variables)
    ),
  )
