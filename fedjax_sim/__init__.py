"""A federated-learning simulator in JAX: a round is one compiled pure function.

What a script needs, but for `fedjax_sim.simulate.simulate`, the loop over
rounds, which lives in the module of its name:

    from fedjax_sim.simulate import simulate

    for state, metrics in simulate(task=..., algorithm=..., data=..., ...):
      print(metrics["round"], metrics["test/accuracy"])

Whoever writes an algorithm finds the rest of the contract in `fedjax_sim.base`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fedjax_sim.base import (
    Aggregator,
    Algorithm,
    Pass,
    Report,
    Task,
    Transform,
    Variables,
  )
  from fedjax_sim.data import FederatedData, FederatedDataset, make_dataset
  from fedjax_sim.distributed import setup
  from fedjax_sim.optimizers import Optimizer, optimizer
  from fedjax_sim.prediction import predict
  from fedjax_sim.round import RunState
  from fedjax_sim.runtime import Runtime
  from fedjax_sim.sampling import Sampler
  from fedjax_sim.simulator import Simulator
  from fedjax_sim.tasks import function_task, linen_task, nnx_task
  from fedjax_sim.work import LocalWork

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
  "predict",
  "setup",
]

_HOME = {
  "Aggregator": "fedjax_sim.base",
  "Algorithm": "fedjax_sim.base",
  "FederatedData": "fedjax_sim.data",
  "FederatedDataset": "fedjax_sim.data",
  "LocalWork": "fedjax_sim.work",
  "Optimizer": "fedjax_sim.optimizers",
  "Pass": "fedjax_sim.base",
  "Report": "fedjax_sim.base",
  "RunState": "fedjax_sim.round",
  "Runtime": "fedjax_sim.runtime",
  "Sampler": "fedjax_sim.sampling",
  "Simulator": "fedjax_sim.simulator",
  "Task": "fedjax_sim.base",
  "Transform": "fedjax_sim.base",
  "Variables": "fedjax_sim.base",
  "function_task": "fedjax_sim.tasks",
  "linen_task": "fedjax_sim.tasks",
  "make_dataset": "fedjax_sim.data",
  "nnx_task": "fedjax_sim.tasks",
  "optimizer": "fedjax_sim.optimizers",
  "predict": "fedjax_sim.prediction",
  "setup": "fedjax_sim.distributed",
}


def __getattr__(name: str) -> Any:
  """Imports a name when it is asked for: `import fedjax_sim` costs nothing."""
  if name not in _HOME:
    raise AttributeError(f"module 'fedjax_sim' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME[name]), name)
