"""pFedMe: personal models on the Moreau envelopes of clients' losses.

Dinh et al. 2020, "Personalized federated learning with Moreau envelopes" (arXiv
2006.08848), algorithm 1. Client i has a personal model theta_i near its copy
w_i of the global one. A local step takes a batch D and finds, by K steps,

    theta_i ~ argmin f_i(theta; D) + lambda / 2 ||theta - w_i||^2

and then follows the envelope's gradient, lambda (w_i - theta_i):

    w_i <- w_i - eta lambda (w_i - theta_i)

The server goes part of the way to the mean, w <- (1 - beta) w + beta mean(w_i).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim import core
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  Key,
  Metric,
  Pass,
  PyTree,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.training import own_models
from fedjax_sim.training.local import LocalState, metric, zero_metric
from fedjax_sim.training.optimizers import Optimizer, descend


class Carry(NamedTuple):
  """FedAvg's carry, with w_i in it, and theta_i."""

  shared: LocalState
  theta: PyTree


def pfedme(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  lam: float = 15.0,
  inner_rate: float = 0.05,
  inner_steps: int = 5,
  weighting: str = "uniform",
) -> Algorithm:
  """Return FedAvg whose clients follow their losses' Moreau envelopes.

  Clients are evaluated with their personal models; until a client first takes
  part it uses the current global one. As in the authors' code, theta_i begins
  at the global model in every round and goes on from batch to batch. The
  reported loss is that of theta_i before its last step on each batch.

  Args:
    task: what clients train.
    client_optimizer: takes the steps of w_i, with lambda (w_i - theta_i) as
      gradient; sgd, whose learning rate is the paper's eta. Starts anew in
      every round.
    server_optimizer: sgd, whose learning rate is the paper's beta.
    lam: lambda, how strongly theta_i is held near w_i, > 0.
    inner_rate: step size of theta_i, > 0; below 2 / lam, or it diverges.
    inner_steps: K, steps of theta_i on every batch, at least 1.
    weighting: as in `fedavg`; the paper's is `uniform`.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  numbers = {
    "lam": validate.number("lam", lam, gt=0),
    "inner_rate": validate.number("inner_rate", inner_rate, gt=0),
  }
  steps = validate.integer("inner_steps", inner_steps)
  base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)
  training = base.passes[0]

  def start(client: Client) -> Carry:
    return Carry(training.start(client), client.message.params)

  def step(client: Client, carry: Carry, batch: Batch, key: Key) -> Carry:
    w = carry.shared.params
    lam, rate = client.hparams["lam"], client.hparams["inner_rate"]
    towards = lambda theta, w: jax.tree.map(
      lambda t, x: lam.astype(t.dtype) * (t - x), theta, w
    )

    def inner(
      state: tuple[Array, PyTree, PyTree, Metric], _: None
    ) -> tuple[tuple[Array, PyTree, PyTree, Metric], None]:
      i, theta, buffers, _seen = state

      def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
        variables = Variables(params, buffers, client.message.frozen)
        own = jax.random.fold_in(key, i)
        return core.mean_loss(task, variables, batch, own)

      slope, (buffers, seen) = jax.grad(loss, has_aux=True)(theta)
      theta = jax.tree.map(
        lambda t, g, pull: t - rate.astype(t.dtype) * (g + pull),
        theta,
        slope,
        towards(theta, w),
      )
      return (i + 1, theta, buffers, seen), None

    first, seen = jnp.zeros((), jnp.int32), metric(zero_metric())
    begun = first, carry.theta, carry.shared.buffers, seen
    (_, theta, buffers, seen), _ = lax.scan(inner, begun, length=steps)
    params, state = descend(
      client_optimizer.build(client.hparams["client"]),
      towards(w, theta),
      carry.shared.optimizer,
      w,
    )
    total = compensated.add(carry.shared.loss, seen)
    return Carry(LocalState(params, buffers, state, total), theta)

  def finish(client: Client, carry: Carry) -> Report:
    kept = own_models.kept(carry.theta, carry.shared.buffers)
    return base.finish(client, carry.shared)._replace(state=kept)

  return base._replace(
    passes=(
      Pass(start, step, tokens=lambda carry: metric(carry.shared.loss).weight),
    ),
    finish=finish,
    client_init=lambda server, hparams: own_models.first(server.variables),
    personal=own_models.personal,
    hparams={**base.hparams, **numbers},
  )
