"""Ditto: every client trains a model of its own, held near the global one.

Li et al. 2021, "Ditto: Fair and robust federated learning through
personalization" (arXiv 2012.04221), algorithm 1. Besides FedAvg's local steps,
client k minimizes F_k(v_k) + lambda / 2 ||v_k - w^t||^2 by the steps

    v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w^t))
"""

from __future__ import annotations

import jax

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Algorithm,
  Client,
  PyTree,
  Report,
  Task,
  Variables,
  validate,
)
from fedjax_sim.training import own_models
from fedjax_sim.training.local import LocalState, local_training
from fedjax_sim.training.optimizers import Optimizer


def ditto(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  lam: float = 0.1,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg, with a second pass that trains the client's own model.

  Clients are evaluated with their own models, which start at the first global
  one; until a client first takes part it uses the current global one.

  Args:
    task: what clients train.
    client_optimizer: of both models; starts anew in every round.
    server_optimizer: sgd with learning rate 1 takes the clients' mean.
    lam: lambda, how strongly v_k is held near the global model, >= 0; with 0
      the own models are trained locally, by themselves.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: lam is not such a number.
  """
  lam = validate.number("lam", lam, ge=0)
  base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)

  def towards_global(client: Client, v: PyTree, gradient: PyTree) -> PyTree:
    return jax.tree.map(
      lambda g, v, w: g + client.hparams["lam"].astype(g.dtype) * (v - w),
      gradient,
      v,
      client.message.params,
    )

  def own_model(client: Client) -> Variables:
    return own_models.in_place(client.message, client.state)

  personal = local_training(
    task, client_optimizer, gradient_hook=towards_global, get_model=own_model
  )

  def finish(client: Client, shared: LocalState, own: LocalState) -> Report:
    kept = own_models.kept(own.params, own.buffers)  # v_k
    return base.finish(client, shared)._replace(state=kept)

  return base._replace(
    passes=(*base.passes, personal.local_pass),
    finish=finish,
    hparams={**base.hparams, "lam": lam},
    client_init=lambda server, hparams: own_models.first(server.variables),
    personal=own_models.personal,
  )
