"""FedSGD: one gradient over all of a client's data, one step of the server.

McMahan et al. 2017 (arXiv 1602.05629), section 2: FedAvg's baseline. Clients
do not train; they send the mean gradient at the server's parameters, whatever
the batch size, which only bounds memory. Here its negative is the update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim import base
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.base import (
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
)
from fedjax_sim.local import LocalState, add_metrics, zero_metric
from fedjax_sim.optimizers import Optimizer, optimizer


def fedsgd(
    task: Task, server_optimizer: Optimizer, *, weighting: str = "examples"
) -> Algorithm:
  """One full-batch gradient a client; client.epochs and rates have no say.

  Args:
    task: what is trained.
    server_optimizer: takes the step.
    weighting: as in `fedavg`.
  """

  def start(client: Client) -> LocalState:
    params, buffers, _ = client.message
    zeros = jax.tree.map(jnp.zeros_like, params)
    return LocalState(zeros, buffers, (), zero_metric())

  def step(
      client: Client, carry: LocalState, batch: Batch, key: Key
  ) -> LocalState:
    def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
      variables = client.message._replace(
          params=params, buffers=carry.buffers
      )
      mean, (buffers, total) = base.mean_loss(task, variables, batch, key)
      return mean * total.weight, (buffers, total)

    gradient, (buffers, total) = jax.grad(loss, has_aux=True)(
        client.message.params
    )
    summed = jax.tree.map(jnp.add, carry.params, gradient)
    return LocalState(summed, buffers, (), add_metrics(carry.loss, total))

  def finish(client: Client, carry: LocalState) -> Report:
    count = jnp.maximum(carry.loss.weight, 1)
    update = jax.tree.map(
        lambda g: -g / count.astype(g.dtype), carry.params
    )
    report = local.finish(client, carry._replace(params=client.message.params))
    return report._replace(update=update)

  local = fedavg(
      task,
      optimizer("sgd", learning_rate=0.0),
      server_optimizer,
      weighting=weighting,
  )
  return local._replace(
      start=start,
      passes=(Pass(step, epochs=1),),
      finish=finish,
      hparams={"server": server_optimizer.hparams},
  )
