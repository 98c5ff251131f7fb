"""An algorithm whose weights a private run cannot take as they are."""

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm


def by_steps(task, client_optimizer, server_optimizer) -> Algorithm:
  """FedAvg in which a client weighs as much as it has local steps."""
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")

  def finish(client, carry):
    report = base.finish(client, carry)
    return report._replace(weight=client.num_steps[0].astype("float32"))

  return base._replace(finish=finish)
