"""An algorithm whose local steps count the rows that only fill up a batch."""

import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm


def unmasked(task, client_optimizer, server_optimizer) -> Algorithm:
  """FedAvg with a mean over all rows of a batch."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")
  (training,) = base.passes

  def step(client, carry, batch, key):
    everything = batch._replace(mask=jnp.ones_like(batch.mask))
    return training.step(client, carry, everything, key)

  return base._replace(passes=(training._replace(step=step),))
