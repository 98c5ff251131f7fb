"""Centralized training on the pooled data, the baseline of federated learning.

One client holds the union of all clients' data and keeps its optimizer's state
from round to round, so this is ordinary mini-batch training; a round is
`client.epochs` epochs, or `client.steps` steps.
"""

from __future__ import annotations

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, Requirements, Task
from fedjax_sim.training.optimizers import Optimizer, optimizer


def centralized(task: Task, client_optimizer: Optimizer) -> Algorithm:
  """Return ordinary training on the pooled data of all clients.

  Args:
    task: what is trained.
    client_optimizer: keeps its state from round to round.
  """
  mean = optimizer("sgd", learning_rate=1.0)
  base = fedavg(task, client_optimizer, mean, keep_optimizer=True)
  return base._replace(requirements=Requirements(pools_data=True))
