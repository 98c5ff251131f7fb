"""An algorithm of one's own: FedExP, a change of two functions of FedAvg.

Jhunjhunwala et al. 2023, "FedExP: Speeding up federated averaging via
extrapolation" (arXiv 2301.09604).

fedjax-sim run --config=docs/own/algorithm.py --workdir=runs/algorithm
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedjax_sim import Algorithm
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import default_config


def fedexp(
  task, client_optimizer, server_optimizer, epsilon: float = 0.001
) -> Algorithm:
  """FedAvg whose server steps are longer the less the clients agree."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")

  def square(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))

  def finish(client, carry):  # what a client sends: also its squared norm
    report = base.finish(client, carry)
    return report._replace(statistics=square(report.update))

  def apply(server, aggregate, context):  # statistics: their mean
    ratio = aggregate.statistics / (square(aggregate.update) + epsilon)
    step = jnp.maximum(1.0, ratio / 2)
    update = jax.tree.map(lambda u: step * u, aggregate.update)
    return base.apply(server, aggregate._replace(update=update), context)

  return base._replace(finish=finish, apply=apply)


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.algorithm.name = f"{__file__}:fedexp"
  config.data.alpha = 0.1  # clients differ in their classes
  config.client.batch_size = 4
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
