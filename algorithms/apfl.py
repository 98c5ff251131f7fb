"""APFL: every client mixes a model of its own with the global one.

Deng et al. 2020, "Adaptive personalized federated learning" (arXiv 2003.13461),
algorithm 1; FLUTE's `personalization` server with `convex_model_interp`. In
each local step the copy w of the global model takes FedAvg's step, and the
client's own model v one at the mixture m = alpha v + (1 - alpha) w:

    v <- v - rate alpha grad f(m)

The paper's alpha follows its own gradient, equation 10. As in its authors' code
(FedTorch) it does so once per round, at the round's first step:

    alpha <- clip(alpha - alpha_rate <v - w, grad f(m)>, 0, 1)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim import core
from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  HParams,
  Key,
  Metric,
  Pass,
  PyTree,
  Report,
  Task,
  Variables,
  validate,
)
from fedjax_sim.core.tree import in_dtype
from fedjax_sim.training.local import LocalState, metric
from fedjax_sim.training.optimizers import Optimizer, descend


class Own(NamedTuple):
  """The personal state that a client keeps.

  Attributes:
    params: v.
    buffers: those that training at the mixture leaves.
    alpha: shape=(), float32; from 0 to 1.
    trained: shape=(), bool; whether the client ever took part.
  """

  params: PyTree
  buffers: PyTree
  alpha: Array
  trained: Array


class Carry(NamedTuple):
  """FedAvg's carry, the client's own model, and its optimizer's state."""

  shared: LocalState
  own: Own
  optimizer: PyTree
  first: Array  # shape=(), bool; whether the round's first step is to come


def mix(alpha: Array, own: PyTree, shared: PyTree) -> PyTree:
  """Return `alpha own + (1 - alpha) shared`, in the dtypes of `shared`."""
  return jax.tree.map(
    lambda v, w: in_dtype(alpha * v + (1 - alpha) * w, w.dtype), own, shared
  )


def apfl(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  alpha: float = 0.5,
  alpha_rate: float = 0.1,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg whose clients mix the global model with one of their own.

  The server is FedAvg's. Clients are evaluated with the mixture. Their own
  models start at the initial global one; until a client first takes part it
  uses the current global model.

  Args:
    task: what clients train.
    client_optimizer: of both models; starts anew in every round.
    server_optimizer: takes the negative mean update as a gradient.
    alpha: initial weight of a client's own model, from 0 to 1.
    alpha_rate: learning rate of alpha, >= 0; 0 keeps it.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  numbers = {
    "alpha": validate.number("alpha", alpha, ge=0, le=1),
    "alpha_rate": validate.number("alpha_rate", alpha_rate, ge=0),
  }
  base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)
  training = base.passes[0]

  def start(client: Client) -> Carry:
    own: Own = client.state
    optimizer = client_optimizer.build(client.hparams["client"])
    state = optimizer.init(own.params)
    return Carry(training.start(client), own, state, jnp.ones((), bool))

  def step(client: Client, carry: Carry, batch: Batch, key: Key) -> Carry:
    own, w = carry.own, carry.shared.params

    def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
      variables = Variables(params, own.buffers, client.message.frozen)
      return core.mean_loss(task, variables, batch, key)

    mixture = mix(own.alpha, own.params, w)
    gradient, (buffers, _) = jax.grad(loss, has_aux=True)(mixture)
    params, optimizer = descend(
      client_optimizer.build(client.hparams["client"]),
      jax.tree.map(lambda g: own.alpha.astype(g.dtype) * g, gradient),
      carry.optimizer,
      own.params,
    )
    slope = _inner(jax.tree.map(jnp.subtract, own.params, w), gradient)
    moved = jnp.clip(own.alpha - client.hparams["alpha_rate"] * slope, 0, 1)
    alpha = jnp.where(carry.first, moved.astype(jnp.float32), own.alpha)
    return Carry(
      training.step(client, carry.shared, batch, key),
      own._replace(params=params, buffers=buffers, alpha=alpha),
      optimizer,
      jnp.zeros((), bool),
    )

  def finish(client: Client, carry: Carry) -> Report:
    report = base.finish(client, carry.shared)
    alpha = Metric(carry.own.alpha, jnp.ones((), jnp.float32))
    return report._replace(
      state=carry.own._replace(trained=jnp.ones((), bool)),
      metrics={**report.metrics, "alpha": alpha},
    )

  def client_init(server: ServerState, hparams: HParams) -> Own:
    params, buffers, _ = server.variables
    alpha = jnp.asarray(hparams["alpha"], jnp.float32)
    return Own(params, buffers, alpha, jnp.zeros((), bool))

  def personal(message: Variables, own: Own) -> Variables:
    alpha = jnp.where(own.trained, own.alpha, 0)
    mine, shared = (own.params, own.buffers), (message.params, message.buffers)
    params, buffers = mix(alpha, mine, shared)
    return message._replace(params=params, buffers=buffers)

  return base._replace(
    passes=(
      Pass(start, step, tokens=lambda carry: metric(carry.shared.loss).weight),
    ),
    finish=finish,
    client_init=client_init,
    personal=personal,
    hparams={**base.hparams, **numbers},
  )


def _inner(a: PyTree, b: PyTree) -> Array:
  """Return <a, b> over all leaves; shape=(), float32."""
  products = jax.tree.map(
    lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b
  )
  return jax.tree.reduce(jnp.add, products)
