"""FedSGD: one gradient over all of a client's data, one step of the server.

McMahan et al. 2017, "Communication-efficient learning of deep networks from
decentralized data" (arXiv 1602.05629), section 2: FedAvg's baseline. Clients do
not train; they send the mean gradient at the server's parameters.
"""

from __future__ import annotations

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, Task
from fedjax_sim.training.local import full_gradient
from fedjax_sim.training.optimizers import Optimizer


def fedsgd(
  task: Task, server_optimizer: Optimizer, *, weighting: str = "examples"
) -> Algorithm:
  """Return FedSGD: one full-batch gradient per client and round.

  A client's learning rate and number of epochs have no effect.

  Args:
    task: what is trained.
    server_optimizer: takes the step along the clients' mean gradient.
    weighting: as in `fedavg`.
  """
  local = full_gradient(task, weighting=weighting)
  # FedAvg's server does the rest.
  base = fedavg(task, server_optimizer, server_optimizer)
  return base._replace(
    passes=(local.local_pass,),
    finish=local.finish,
    hparams={"server": server_optimizer.hparams},
  )
