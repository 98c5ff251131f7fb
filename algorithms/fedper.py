"""FedPer: clients share a body, and every client has a head of its own.

Arivazhagan et al. 2019, "Federated learning with personalization layers" (arXiv
1912.00818), algorithms 1 and 2. Client j trains the base layers W_B and its
personalization layers W_P_j together; the server averages the W_B.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedjax_sim.algorithms.private_parameters import private_parameters
from fedjax_sim.core import Algorithm, Task
from fedjax_sim.training.optimizers import Optimizer


def fedper(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  private: Sequence[str],
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg of the body alone; see `private_parameters`.

  Args:
    task: what clients train.
    client_optimizer: of body and head; starts anew in every round.
    server_optimizer: of the body; sgd with learning rate 1 takes the mean.
    private: patterns of the personalization layers, such as `("head/",)`.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a pattern is none or matches nothing, or no parameter
      is shared.
  """
  return private_parameters(
    task,
    client_optimizer,
    server_optimizer,
    private=private,
    weighting=weighting,
  )
