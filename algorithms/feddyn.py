"""FedDyn: a regularizer that follows each client makes their optima agree.

Acar et al. 2021, "Federated learning based on dynamic regularization" (arXiv
2111.04263), algorithm 1. Client k keeps g_k, its gradient where it last ended,
and the server keeps h; all start at 0. From theta^(t-1) a client minimizes

    L_k(theta) - <g_k, theta> + alpha / 2 ||theta - theta^(t-1)||^2

by local steps that end in theta_k. With m clients, of which those in P train,

    g_k <- g_k - alpha (theta_k - theta^(t-1))
    h <- h - alpha / m sum_{k in P} (theta_k - theta^(t-1))
    theta^t = mean_{k in P} theta_k - h / alpha
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
  validate,
)
from fedjax_sim.core.tree import zeros_accumulator
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer
from fedjax_sim.training.wrappers import wrap_algorithm


class ServerState(NamedTuple):
  """FedAvg's state, with theta in it, and h."""

  server: fedavg.ServerState
  h: PyTree  # like the parameters, float32 at least


def feddyn(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  alpha: float = 0.01,
) -> Algorithm:
  """Return FedAvg with a regularizer that follows each client.

  All clients count the same, as in the paper.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round; in place of the exact minimum
      clients take as many steps as the run says.
    server_optimizer: sgd with learning rate 1 is the paper's.
    alpha: weight of the regularizer, > 0; the paper takes 0.001 to 0.1.

  Raises:
    TypeError, ValueError: alpha is not such a number.
  """
  alpha = validate.number("alpha", alpha, gt=0)

  def regularized(client: Client, params: PyTree, gradient: PyTree) -> PyTree:
    strength = client.hparams["alpha"]
    return jax.tree.map(
      lambda g, g_k, p, start: (
        g - g_k.astype(g.dtype) + strength.astype(g.dtype) * (p - start)
      ),
      gradient,
      client.state,
      params,
      client.message.params,
    )

  base = fedavg.fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting="uniform",
    gradient_hook=regularized,
  )

  def init(
    server: fedavg.ServerState, key: Key, hparams: HParams
  ) -> ServerState:
    return ServerState(server, zeros_accumulator(server.variables.params))

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    strength = client.hparams["alpha"]
    renewed = jax.tree.map(
      lambda g_k, u: g_k - strength.astype(g_k.dtype) * u.astype(g_k.dtype),
      client.state,
      report.update,
    )
    return report._replace(state=renewed)

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    strength = context.hparams["alpha"]
    share = aggregate.clients / context.num_clients  # |P| / m
    h = jax.tree.map(
      lambda h, u: h - (strength * share).astype(h.dtype) * u.astype(h.dtype),
      server.h,
      aggregate.update,
    )
    update = jax.tree.map(
      lambda u, h: u - (h / strength.astype(h.dtype)).astype(u.dtype),
      aggregate.update,
      h,
    )
    moved = base.apply(
      server.server, aggregate._replace(update=update), context
    )
    return ServerState(moved, h)

  wrapped = wrap_algorithm(
    base,
    init=init,
    finish=finish,
    apply=apply,
    hparams={"alpha": alpha},
    requirements=Requirements(own_weights=True),  # h is the mean of the g_k
  )
  return wrapped._replace(
    client_init=lambda server, hparams: jax.tree.map(jnp.zeros_like, server.h)
  )
