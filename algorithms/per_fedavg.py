"""Per-FedAvg, first order: a model that one gradient step fits to a client.

Fallah et al. 2020, "Personalized federated learning with theoretical
guarantees: a model-agnostic meta-learning approach" (arXiv 2002.07948),
algorithm 1 in its variant FO, which leaves out the second derivatives. A local
step follows the gradient at the adapted point, on other data:

    u = w - inner_rate grad f(w; D)
    w <- w - rate grad f(u; D')

A local step here has one batch: D holds its first, third, ... example and D'
the others, without padding. A single example is in both.
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
  compensated,
  validate,
)
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer, descend


class Adapted(NamedTuple):
  """The state of a client: the model as adapted when it last took part."""

  params: PyTree
  trained: Array  # shape=(), bool; whether it ever took part


class Carry(NamedTuple):
  """FedAvg's carry, and the first step's u."""

  shared: LocalState
  adapted: PyTree
  first: Array  # shape=(), bool; whether the round's first step is to come


def halves(batch: Batch) -> tuple[Batch, Batch]:
  """Split the batch into two, each masking every other real example.

  Of an odd number of examples the second half has one fewer. A single example
  is in both halves.
  """
  place = jnp.cumsum(batch.mask)  # from 1
  single = place[-1] <= 1
  odd = batch.mask & (single | (place % 2 == 1))
  even = batch.mask & (single | (place % 2 == 0))
  return batch._replace(mask=odd), batch._replace(mask=even)


def per_fedavg(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  inner_rate: float = 0.1,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg whose local steps take the gradient at an adapted point.

  A client is evaluated with the global model that it last received, adapted by
  one inner step on D of its first batch; with the global model if it never took
  part. The reported loss is that of D' at the adapted point. The buffers are
  those after D'; they see the whole batch, as in all algorithms.

  Args:
    task: what clients train.
    client_optimizer: takes the outer steps; starts anew in every round.
    server_optimizer: sgd with learning rate 1 takes the clients' mean.
    inner_rate: step size of the adaptation, >= 0; 0 is FedAvg on half batches.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: inner_rate is not such a number.
  """
  rate = validate.number("inner_rate", inner_rate, ge=0)
  base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)
  training = base.passes[0]

  def start(client: Client) -> Carry:
    params = client.message.params
    return Carry(training.start(client), params, jnp.ones((), bool))

  def step(client: Client, carry: Carry, batch: Batch, key: Key) -> Carry:
    params, buffers, state, total, _ = carry.shared
    inner_key, outer_key = jax.random.split(key)
    inner, outer = halves(batch)

    def gradient(at: PyTree, half: Batch, key: Key) -> tuple[PyTree, PyTree]:
      def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
        variables = Variables(params, buffers, client.message.frozen)
        return core.mean_loss(task, variables, half, key)

      return jax.grad(loss, has_aux=True)(at)

    slope, _ = gradient(params, inner, inner_key)
    rate = client.hparams["inner_rate"]
    adapted = jax.tree.map(
      lambda w, g: w - rate.astype(g.dtype) * g, params, slope
    )
    slope, (buffers, seen) = gradient(adapted, outer, outer_key)
    kept = jax.tree.map(
      lambda u, old: jnp.where(carry.first, u, old), adapted, carry.adapted
    )
    params, state = descend(
      client_optimizer.build(client.hparams["client"]), slope, state, params
    )
    shared = LocalState(params, buffers, state, compensated.add(total, seen))
    return Carry(shared, kept, jnp.zeros((), bool))

  def finish(client: Client, carry: Carry) -> Report:
    kept = Adapted(carry.adapted, jnp.ones((), bool))
    return base.finish(client, carry.shared)._replace(state=kept)

  def client_init(server: ServerState, hparams: HParams) -> Adapted:
    return Adapted(server.variables.params, jnp.zeros((), bool))

  def personal(message: Variables, state: Adapted) -> Variables:
    params = jax.tree.map(
      lambda u, w: jnp.where(state.trained, u, w), state.params, message.params
    )
    return message._replace(params=params)

  return base._replace(
    passes=(Pass(start, step),),
    finish=finish,
    client_init=client_init,
    personal=personal,
    hparams={**base.hparams, "inner_rate": rate},
  )
