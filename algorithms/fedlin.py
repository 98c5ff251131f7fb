"""FedLin: corrected local gradients, and shorter steps where there are more.

Mitra et al. 2021, "Linear convergence in federated learning: Tackling client
heterogeneity and sparse gradients" (arXiv 2102.07053), algorithm 1. Clients
compute their full gradients at x, whose mean g goes back to them. Client i then
takes tau_i local steps

    y <- y - eta_i (grad f_i(y) - grad f_i(x) + g),    eta_i = eta / tau_i

and x becomes the mean of the y. All clients go about equally far, however many
steps they take, and the corrections take them to the common optimum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.algorithms.mime import gradient_answer
from fedjax_sim.algorithms.mime_lite import get_x
from fedjax_sim.core import (
  Algorithm,
  Batch,
  Client,
  Key,
  PyTree,
  Report,
  Survey,
  Task,
  Variables,
  in_float32,
)
from fedjax_sim.training.local import LocalState, full_gradient, metric
from fedjax_sim.training.optimizers import Optimizer, check_sgd


class Asked(NamedTuple):
  """What clients get before the survey: x."""

  x: Variables


class Message(NamedTuple):
  """What clients train with: x, and the correction of their gradients."""

  x: Variables
  correction: PyTree  # g; in a local step, g - grad f_i(x)


class Corrected(NamedTuple):
  """A client's carry: - grad f_i(x), and its training."""

  minus_gradient: PyTree
  training: LocalState


def fedlin(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str = "uniform",
) -> Algorithm:
  """Return FedAvg with corrected gradients, in rounds of two exchanges.

  Clients compute their full gradients twice: for the survey, and for their own
  correction.

  Args:
    task: what clients train.
    client_optimizer: plain sgd; its learning rate is eta.
    server_optimizer: sgd with learning rate 1 takes the mean, as in the paper.
    weighting: of the gradients in g, and of the y, as in `fedavg`; the paper's
      is `uniform`.

  Raises:
    ValueError: a client optimizer other than plain sgd.
  """
  check_sgd("client_optimizer", client_optimizer)
  at_x = full_gradient(task, weighting=weighting, get_model=get_x)

  def corrected(client: Client, params: PyTree, gradient: PyTree) -> PyTree:
    tau = client.num_steps[-1]
    return jax.tree.map(
      lambda g, more: (g + more.astype(g.dtype)) / tau.astype(g.dtype),
      gradient,
      client.message.correction,
    )

  base = fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting=weighting,
    gradient_hook=corrected,
    get_model=get_x,
  )
  (training,) = base.passes

  def start(client: Client, full: LocalState) -> Corrected:
    minus_gradient = in_float32(at_x.finish(client, full).update)
    return Corrected(minus_gradient, training.start(client))

  def step(
    client: Client, carry: Corrected, batch: Batch, key: Key
  ) -> Corrected:
    correction = jax.tree.map(
      lambda g, minus: g + minus.astype(g.dtype),
      client.message.correction,
      carry.minus_gradient,
    )
    message = client.message._replace(correction=correction)
    client = client._replace(message=message)
    return carry._replace(
      training=training.step(client, carry.training, batch, key)
    )

  def finish(client: Client, full: LocalState, carry: Corrected) -> Report:
    del full
    return base.finish(client, carry.training)

  def broadcast(server: ServerState) -> Asked:
    return Asked(server.variables)

  steps = training._replace(
    start=start,
    step=step,
    tokens=lambda carry: metric(carry.training.loss).weight,
  )
  return base._replace(
    broadcast=broadcast,
    passes=(at_x.local_pass, steps),
    finish=finish,
    survey=Survey(
      passes=(at_x.local_pass,),
      finish=lambda client, carry: gradient_answer(at_x.finish(client, carry)),
      message=lambda first, g: Message(first.x, g),
    ),
  )
