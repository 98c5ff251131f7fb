"""LG-FedAvg: every client has a representation of its own below a shared head.

Liang et al. 2020, "Think locally, act globally: Federated learning with local
and global representations" (arXiv 2001.01523), algorithm 1. Client m trains its
local layers and the global ones on top of them together; the server averages
the global ones. It is FedPer with the other half of the model kept private.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedjax_sim.algorithms.private_parameters import private_parameters
from fedjax_sim.core import Algorithm, Task
from fedjax_sim.training.optimizers import Optimizer


def lg_fedavg(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  private: Sequence[str],
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg of the upper layers alone; see `private_parameters`.

  Args:
    task: what clients train.
    client_optimizer: of all layers; starts anew in every round.
    server_optimizer: of the global ones; sgd with learning rate 1 takes the
      mean.
    private: patterns of the local layers, such as `("conv",)`.
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
