"""Reptile: the server goes part of the way to the clients' mean.

Nichol et al. 2018, "On first-order meta-learning algorithms" (arXiv
1803.02999), the batched version of algorithm 1, with clients as tasks: from w
every client trains for some steps to w_i, and w <- w + epsilon mean(w_i - w).
The result is an initialization that a few local steps adapt to a client.
"""

from __future__ import annotations

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, Task
from fedjax_sim.training.optimizers import Optimizer


def reptile(
  task: Task, client_optimizer: Optimizer, server_optimizer: Optimizer
) -> Algorithm:
  """Return FedAvg in which all clients count the same.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round; client.steps is the paper's k.
    server_optimizer: sgd, whose learning rate is epsilon; or another one, to
      which the mean of w - w_i is a gradient, as in the paper.
  """
  return fedavg(task, client_optimizer, server_optimizer, weighting="uniform")
