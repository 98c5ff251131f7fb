"""An algorithm of one's own: FedNova, a change of two functions of FedAvg.

Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous
federated optimization" (arXiv 2007.07481).

fedjax-sim run --config=docs/own/algorithm.py --workdir=runs/algorithm
"""

import jax
from ml_collections import ConfigDict

from fedjax_sim import Algorithm
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import default_config


def fednova(task, client_optimizer, server_optimizer) -> Algorithm:
  """FedAvg that does not favour clients with many local steps."""
  base = fedavg(task, client_optimizer, server_optimizer)

  def finish(client, carry):  # what a client sends: its mean step
    report = base.finish(client, carry)
    steps = client.num_steps[0].astype("float32")
    mean = jax.tree.map(lambda u: u / steps, report.update)
    return report._replace(update=mean, statistics=steps)

  def apply(server, aggregate, context):  # as many steps as clients take
    steps = aggregate.statistics  # their weighted mean
    update = jax.tree.map(lambda u: steps * u, aggregate.update)
    return base.apply(server, aggregate._replace(update=update), context)

  return base._replace(finish=finish, apply=apply)


def get_config(arg: str = "") -> ConfigDict:
  """The config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.algorithm.name = f"{__file__}:fednova"
  config.data.partition = "power_law"  # clients differ in their steps
  config.client.batch_size = 4
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
