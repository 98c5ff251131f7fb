"""FedAvgM: FedAvg with momentum on the server.

Hsu et al. 2019, "Measuring the effects of non-identical data distribution for
federated visual classification" (arXiv 1909.06335), section 4.3: with the mean
Delta of the clients' updates the server takes

    v <- beta v + Delta
    w <- w + v
"""

from __future__ import annotations

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, Task, validate
from fedjax_sim.training.optimizers import Optimizer, optimizer


def fedavgm(
  task: Task,
  client_optimizer: Optimizer,
  *,
  learning_rate: float = 1.0,
  beta: float = 0.9,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg with momentum on the server.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    learning_rate: factor of the server's step, >= 0; the paper's is 1. A run's
      `server.learning_rate`, which a schedule multiplies.
    beta: momentum, >= 0 and < 1; the paper's. A run's `server.momentum`.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  momentum = optimizer(
    "sgd",
    learning_rate=validate.number("learning_rate", learning_rate, ge=0),
    momentum=validate.number("beta", beta, ge=0, lt=1),
  )
  return fedavg(task, client_optimizer, momentum, weighting=weighting)
