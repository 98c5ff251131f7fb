"""Ditto, Li et al. 2021 (arXiv 2012.04221), algorithm 1: personal models."""

import jax

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.training.local import local_training
from fedjax_sim.training.optimizers import optimizer


def ditto(task, rate, strength=0.1):
  """FedAvg, and a second pass that trains the client's own parameters."""
  sgd = optimizer("sgd", learning_rate=rate)
  base = fedavg(task, sgd, optimizer("sgd", learning_rate=1.0))

  def towards_global(client, params, gradient):
    return jax.tree.map(
      lambda g, v, w: g + client.hparams["lambda"] * (v - w),
      gradient,
      params,
      client.message.params,
    )

  own = local_training(
    task,
    sgd,
    adjust=towards_global,
    received=lambda client: client.message._replace(params=client.state),
  )

  def finish(client, trained, mine):
    return base.finish(client, trained)._replace(state=mine.params)

  return base._replace(
    passes=(*base.passes, own.local_pass),
    finish=finish,
    hparams={**base.hparams, "lambda": strength},
    client_init=lambda server, hparams: server.variables.params,
    personal=lambda message, state: message._replace(params=state),
  )
