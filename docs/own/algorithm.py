"""An algorithm of one's own: a change of two functions of FedAvg.

Where clients differ, their updates' mean is shorter than they are; this one
takes it at their mean length.

fedjax-sim run --config=docs/own/algorithm.py --workdir=runs/algorithm
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedjax_sim import Algorithm
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import default_config
from fedjax_sim.core.tree import tree_norm


def full_length(
  task, client_optimizer, server_optimizer, limit: float = 10.0
) -> Algorithm:
  """FedAvg whose server steps are as long as the clients' updates are."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")

  def finish(client, carry):  # what a client sends: also its update's norm
    report = base.finish(client, carry)
    return report._replace(statistics=tree_norm(report.update))

  def apply(server, aggregate, context):  # statistics: their mean
    length = jnp.maximum(tree_norm(aggregate.update), 1e-12)
    factor = jnp.minimum(aggregate.statistics / length, limit)
    update = jax.tree.map(lambda u: factor * u, aggregate.update)
    return base.apply(server, aggregate._replace(update=update), context)

  return base._replace(finish=finish, apply=apply)


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.algorithm.name = f"{__file__}:full_length"
  config.data.alpha = 0.1  # clients differ in their classes
  config.client.batch_size = 4
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
