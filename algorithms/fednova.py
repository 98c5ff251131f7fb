"""FedNova: FedAvg that does not favor clients with many local steps.

Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous
federated optimization" (arXiv 2007.07481). After tau_i local steps a client's
update is -eta G_i a_i, where a_i says how often each of its gradients G_i
counts. Clients send d_i = G_i a_i / ||a_i||_1, and the server takes the step

    x <- x - tau_eff sum_i p_i eta d_i,    tau_eff = sum_i p_i ||a_i||_1

With momentum rho, or with FedProx's local loss, section 4 of the paper has

    a_i = [1 - rho^tau_i, ..., 1 - rho] / (1 - rho)
    a_i = [(1 - eta mu)^(tau_i - 1), ..., 1 - eta mu, 1]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  Report,
  Task,
  validate,
)
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer, check_sgd


def fednova(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  mu: float = 0.0,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg that normalizes every update by its client's local steps.

  Args:
    task: what clients train.
    client_optimizer: sgd, with momentum rho if it has one; starts anew in every
      round.
    server_optimizer: sgd with learning rate 1 is the paper's; with momentum its
      hybrid of local and slow momentum.
    mu: weight of FedProx's proximal term in the clients' loss, >= 0; 0: there
      is none. Goes with plain sgd.
    weighting: p_i, up to a factor; as in `fedavg`.

  Raises:
    TypeError, ValueError: a client optimizer other than sgd, or with a momentum
      that is not in [0, 1), or mu is not such a number, or too large for the
      client's rate.
  """
  mu = validate.number("mu", mu, ge=0)
  allowed = ("momentum", "weight_decay", "max_grad_norm")
  check_sgd("client_optimizer", client_optimizer, *allowed)
  validate.number(
    "client_optimizer's momentum",
    client_optimizer.hparams.get("momentum", 0.0),
    ge=0,
    lt=1,
  )
  proximal = mu > 0
  if proximal:
    _check_proximal(mu, client_optimizer)
    base = fedprox(
      task, client_optimizer, server_optimizer, mu=mu, weighting=weighting
    )
  else:
    base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    own, tau = client.hparams["client"], client.num_steps[0]
    if proximal:
      length = norm_of_proximal_a(
        tau, own["learning_rate"] * client.hparams["mu"]
      )
    else:
      length = norm_of_a(tau, own.get("momentum", 0.0))
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


def norm_of_proximal_a(tau: Array, pull: Array | float) -> Array:
  """Return ||a_i||_1 of tau steps with a proximal term; shape=(), float32.

  The sum of (1 - pull)^k for k from 0 to tau - 1, which is
  (1 - (1 - pull)^tau) / pull.

  Args:
    tau: number of steps.
    pull: eta mu, below 1.
  """
  tau = tau.astype(jnp.float32)
  pull = jnp.asarray(pull, jnp.float32)
  some = pull > 0
  safe = jnp.where(some, pull, 0.5)
  # By logarithms, as 1 - (1 - pull)^tau loses all digits of a small pull.
  return jnp.where(some, -jnp.expm1(tau * jnp.log1p(-safe)) / safe, tau)


def _check_proximal(mu: float, client_optimizer: Optimizer) -> None:
  """Refuse what the proximal a_i does not describe."""
  if client_optimizer.hparams.get("momentum"):
    raise ValueError(
      f"mu={mu} does not go with a client optimizer with momentum, as the paper"
      " has weights for either alone; unset one of them."
    )
  rate = client_optimizer.hparams["learning_rate"]
  if mu * rate >= 1:
    raise ValueError(
      f"mu={mu} times the client's learning_rate={rate} is >= 1, and a local"
      " step would go past the received model; lower one of them."
    )
