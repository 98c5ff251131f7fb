"""An algorithm whose carry changes its dtype in a local step."""

import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm


def counting(task, client_optimizer, server_optimizer) -> Algorithm:
  """FedAvg that counts its steps, in halves."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")
  (training,) = base.passes

  def start(client):
    return training.start(client), jnp.int32(0)

  def step(client, carry, batch, key):
    inner, count = carry
    return training.step(client, inner, batch, key), count + 0.5

  def finish(client, carry):
    return base.finish(client, carry[0])

  walked = training._replace(start=start, step=step)
  return base._replace(passes=(walked,), finish=finish)
