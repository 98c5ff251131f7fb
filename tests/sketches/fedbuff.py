"""FedBuff, Nguyen et al. 2022 (arXiv 2106.06639), with two versions in flight.

A cohort is the buffer; a client trains from the version that it holds, and a
stale update counts 1 / sqrt(1 + staleness).
"""

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.training.optimizers import optimizer


def fedbuff(task, rate, server_rate=1.0):
  base = fedavg(
    task,
    optimizer("sgd", learning_rate=rate),
    optimizer("sgd", learning_rate=server_rate),
    weighting="uniform",
  )

  def init(key, hparams):
    server = base.init(key, hparams)
    return server, server.variables  # and the version before

  def broadcast(state):
    server, before = state
    return jax.tree.map(
      lambda *versions: jnp.stack(versions), server.variables, before
    )

  def download(message, version):
    return jax.tree.map(lambda x: x[version], message)

  def finish(client, carry):
    report = base.finish(client, carry)
    discount = 1 / jnp.sqrt(1.0 + client.version)
    return report._replace(
      update=jax.tree.map(lambda u: discount * u, report.update)
    )

  def apply(state, aggregate, context):
    server, _ = state
    return base.apply(server, aggregate, context), server.variables

  return base._replace(
    init=init,
    broadcast=broadcast,
    download=download,
    finish=finish,
    apply=apply,
    with_model=None,
    variables=lambda state: state[0].variables,
  )
