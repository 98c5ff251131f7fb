"""An algorithm that draws random numbers in Python, once for all steps."""

import jax
import numpy as np

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm


def noisy(task, client_optimizer, server_optimizer) -> Algorithm:
  """FedAvg with updates that are multiplied by a random number."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")

  def finish(client, carry):
    report = base.finish(client, carry)
    factor = np.float32(np.random.default_rng().normal())
    update = jax.tree.map(lambda u: factor * u, report.update)
    return report._replace(update=update)

  return base._replace(finish=finish)
