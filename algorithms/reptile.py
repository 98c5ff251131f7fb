"""Reptile: the server goes some of the way to the clients' mean.

Nichol et al. 2018, "On first-order meta-learning algorithms" (arXiv
1803.02999), the batched version of algorithm 1, with clients as tasks: from w
every client trains for some steps to w_i, and w <- w + epsilon mean(w_i - w).
What is learned is a point from which a few local steps lead far.
"""

from __future__ import annotations

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, Task
from fedjax_sim.training.optimizers import Optimizer


def reptile(
  task: Task, client_optimizer: Optimizer, server_optimizer: Optimizer
) -> Algorithm:
  """FedAvg in which all clients count the same.

  Args:
    task: what clients train.
    client_optimizer: begins anew in every round; client.steps is the paper's k.
    server_optimizer: sgd, whose learning rate is epsilon; or another, as the
      paper, too, takes the mean of w - w_i for a gradient.
  """
  return fedavg(task, client_optimizer, server_optimizer, weighting="uniform")
