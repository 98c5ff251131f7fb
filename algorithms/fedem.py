"""FedEM: clients' data are mixtures of a few distributions, learned by EM.

Marfoq et al. 2021, "Federated multi-task learning under a mixture of
distributions" (arXiv 2108.10252), algorithm 1. Client t predicts by sum_m
pi_tm p(y | x; theta_m); the components theta_m are shared, the weights pi_t are
its own. In a round, with the theta that the server sent and its last pi,

    E    q_s(m)  is proportional to  pi_tm exp(-l(theta_m; x_s, y_s))
    M    pi_tm = mean of q_s(m) over its examples s
         theta_m: local steps on the mean of q_s(m) l(theta_m; x_s, y_s)

and the server averages the theta_m.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  Examples,
  HParams,
  Key,
  Loss,
  Pass,
  Report,
  Task,
  Variables,
  compensated,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.core.tree import in_float32
from fedjax_sim.tasks.mixture import MixtureLoss, responsibilities
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer


class Received(NamedTuple):
  """What is frozen while a client trains the components.

  Attributes:
    variables: the mixture as the server sent it.
    weights: shape=(components,), float32; the client's pi before the round.
  """

  variables: Variables
  weights: Array


def fedem(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str = "examples",
) -> Algorithm:
  """Return EM with components that clients share and weights of their own.

  Clients are evaluated with their own weights, which begin equal. They send
  them, and the global model has the mean of the last cohort's. Responsibilities
  are those of the whole round, as in the paper: each step computes them of its
  batch, with the components as they were received. The reported loss is that of
  the M-step.

  Args:
    task: a mixture, from `with_mixture`.
    client_optimizer: of the components; starts anew in every round.
    server_optimizer: sgd with learning rate 1 takes the clients' mean.
    weighting: as in `fedavg`; the paper's is `examples`.

  Raises:
    ValueError: the task is no mixture.
  """
  mixture = task.loss
  if not isinstance(mixture, MixtureLoss):
    raise ValueError(
      "algorithm.name='fedem' learns a mixture, and the task is none; set"
      " model.mixture=3, or make it by with_mixture(task, 3)."
    )

  def likely(
    received: Variables, weights: Array, examples: Examples, key: Key
  ) -> tuple[Array, Array]:
    """Return q, (components, batch), and the examples' weights, (batch,)."""
    made = mixture.components(received, examples, key)
    return responsibilities(in_float32(made.value), weights), made.weight

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    received, weights = variables.frozen
    q, _ = likely(received, weights, examples, key)
    own = variables._replace(frozen=received.frozen)
    value, weight, buffers = mixture.components(own, examples, key)
    expected = jnp.sum(jax.lax.stop_gradient(q) * value, axis=0)
    return Loss(expected, weight, variables.buffers._replace(model=buffers))

  base = fedavg(
    task._replace(loss=loss),
    client_optimizer,
    server_optimizer,
    weighting=weighting,
    get_model=lambda client: client.message._replace(
      frozen=Received(client.message, client.state)
    ),
  )

  def start(client: Client) -> Total:
    zero = jnp.zeros(client.state.shape, jnp.float32)
    return compensated.zeros((zero, jnp.zeros((), jnp.float32)))

  def expect(client: Client, sums: Total, batch: Batch, key: Key) -> Total:
    q, weight = likely(client.message, client.state, batch.examples, key)
    real = jnp.where(batch.mask, in_float32(weight), 0)
    return compensated.add(sums, (q @ real, jnp.sum(real)))

  def finish(client: Client, sums: Total, carry: LocalState) -> Report:
    total, count = compensated.rounded(sums)
    mean = total / jnp.where(count > 0, count, 1)
    before = client.state
    weights = jnp.where(count > 0, mean.astype(before.dtype), before)
    report = base.finish(client, carry)
    return report._replace(
      buffers=report.buffers._replace(weights=weights), state=weights
    )

  def client_init(server: ServerState, hparams: HParams) -> Array:
    weights: Array = server.variables.buffers.weights
    return weights

  def personal(message: Variables, weights: Array) -> Variables:
    return message._replace(buffers=message.buffers._replace(weights=weights))

  return base._replace(
    passes=(Pass(start, expect, epochs=1, augmented=False), *base.passes),
    finish=finish,
    client_init=client_init,
    personal=personal,
  )
