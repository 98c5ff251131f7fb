"""q-FedAvg: clients with a high loss count more, so that losses even out.

Li et al. 2020, "Fair resource allocation in federated learning" (arXiv
1905.10497), algorithm 2. It minimizes sum_k p_k F_k(w)^(q + 1) / (q + 1). From
w^t client k trains to w_k; with its loss F_k at w^t and L = 1 / eta it sends

    Delta_k = F_k^q L (w^t - w_k)
    h_k = q F_k^(q - 1) L^2 ||w^t - w_k||^2 + L F_k^q

and the server takes w^(t+1) = w^t - sum_k Delta_k / sum_k h_k. Both are divided
by L here, which changes no quotient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Client,
  Context,
  Report,
  Task,
  validate,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.core.tree import tree_norm
from fedjax_sim.training.local import LocalState, full_loss, mean_of
from fedjax_sim.training.optimizers import Optimizer, check_sgd

LEAST_LOSS = 1e-10  # added to losses, whose power q - 1 may be negative


def q_fedavg(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  q: float = 1.0,
  weighting: str = "uniform",
) -> Algorithm:
  """Return FedAvg that minimizes the mean of a power of the clients' losses.

  A client measures its loss at the received model in a pass of its own.

  Args:
    task: what clients train; its losses must not be negative.
    client_optimizer: sgd; its learning rate is eta. Starts anew in every round.
    server_optimizer: sgd with learning rate 1 is the paper's.
    q: how much clients with a high loss count, >= 0; 0 is FedAvg.
    weighting: p_k, up to a factor; as in `fedavg`. The paper draws clients with
      probabilities p_k and then lets them count the same, hence `uniform`.

  Raises:
    TypeError, ValueError: q is not such a number, or a client optimizer other
      than sgd.
  """
  q = validate.number("q", q, ge=0)
  allowed = ("momentum", "weight_decay", "max_grad_norm")
  check_sgd("client_optimizer", client_optimizer, *allowed)
  base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)

  def finish(client: Client, measured: Total, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    loss = jnp.maximum(mean_of(measured), 0) + LEAST_LOSS
    power = client.hparams["q"].astype(loss.dtype)
    eta = client.hparams["client"]["learning_rate"].astype(loss.dtype)
    square = tree_norm(report.update) ** 2
    slope = jnp.where(eta > 0, square / jnp.where(eta > 0, eta, 1), 0)
    h = power * loss ** (power - 1) * slope + loss**power
    update = jax.tree.map(
      lambda u: (loss**power).astype(u.dtype) * u, report.update
    )
    return report._replace(update=update, statistics=h)

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    h = aggregate.statistics
    inverse = jnp.where(h > 0, 1 / jnp.where(h > 0, h, 1), 0)  # h may be noisy
    update = jax.tree.map(
      lambda u: inverse.astype(u.dtype) * u, aggregate.update
    )
    return base.apply(server, aggregate._replace(update=update), context)

  return base._replace(
    passes=(full_loss(task), *base.passes),
    finish=finish,
    apply=apply,
    hparams={**base.hparams, "q": q},
  )
