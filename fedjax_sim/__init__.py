"""A federated-learning simulator in JAX: a round is one compiled pure function.

What a script needs, but for `fedjax_sim.simulate.simulate`, the loop over
rounds, which lives in the module of its name:

    from fedjax_sim.simulate import simulate

    for state, metrics in simulate(task=..., algorithm=..., data=..., ...):
      print(metrics["round"], metrics["test/accuracy"])

Whoever writes an algorithm finds the rest of the contract in `fedjax_sim.base`.
"""

from fedjax_sim.base import (
  Aggregator,
  Algorithm,
  Pass,
  Report,
  Task,
  Transform,
  Variables,
)
from fedjax_sim.cohort import LocalWork
from fedjax_sim.data import FederatedData, FederatedDataset, make_dataset
from fedjax_sim.distributed import setup
from fedjax_sim.optimizers import Optimizer, optimizer
from fedjax_sim.round import RunState
from fedjax_sim.sampling import Sampler
from fedjax_sim.simulator import Runtime, Simulator
from fedjax_sim.tasks import function_task, linen_task, nnx_task

__all__ = [
  "Aggregator",
  "Algorithm",
  "FederatedData",
  "FederatedDataset",
  "LocalWork",
  "Optimizer",
  "Pass",
  "Report",
  "RunState",
  "Runtime",
  "Sampler",
  "Simulator",
  "Task",
  "Transform",
  "Variables",
  "function_task",
  "linen_task",
  "make_dataset",
  "nnx_task",
  "optimizer",
  "setup",
]
