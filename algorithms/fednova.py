"""FedNova: FedAvg that does not favor clients with many local steps.

Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous
federated optimization" (arXiv 2007.07481). After tau_i local steps a client's
update is -eta G_i a_i, where a_i says how often each of its gradients G_i
counts. Clients send d_i = G_i a_i / ||a_i||_1, and the server takes the step

    x <- x - tau_eff sum_i p_i eta d_i,    tau_eff = sum_i p_i ||a_i||_1
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  Report,
  Task,
)
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer, check_sgd


def fednova(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg that normalizes every update by its client's local steps.

  Args:
    task: what clients train.
    client_optimizer: sgd, with momentum rho if it has one; starts anew in every
      round.
    server_optimizer: sgd with learning rate 1 is the paper's; with momentum its
      hybrid of local and slow momentum.
    weighting: p_i, up to a factor; as in `fedavg`.

  Raises:
    ValueError: a client optimizer other than sgd.
  """
  allowed = ("momentum", "weight_decay", "max_grad_norm")
  check_sgd("client_optimizer", client_optimizer, *allowed)
  base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    rho = client.hparams["client"].get("momentum", 0.0)
    length = norm_of_a(client.num_steps[0], rho)
    normalized = jax.tree.map(
      lambda u: u / length.astype(u.dtype), report.update
    )
    return report._replace(update=normalized, statistics=length)

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    tau_eff = aggregate.statistics
    update = jax.tree.map(
      lambda d: tau_eff.astype(d.dtype) * d, aggregate.update
    )
    return base.apply(server, aggregate._replace(update=update), context)

  return base._replace(finish=finish, apply=apply)


def norm_of_a(tau: Array, rho: Array | float) -> Array:
  """Return ||a_i||_1 of tau steps of SGD with momentum; shape=(), float32.

  a_i = [1 - rho^tau, ..., 1 - rho] / (1 - rho), section 4 of the paper, sums to
  (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho).
  """
  tau = tau.astype(jnp.float32)
  rho = jnp.asarray(rho, jnp.float32)
  return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
