"""A federated-learning simulator in JAX: a round is one compiled pure function.

What a script needs; nothing is loaded before it is used:

    import fedjax_sim as fs

    for state, metrics in fs.simulate(task=..., algorithm=..., data=..., ...):
      print(metrics["round"], metrics["test/accuracy"])

The parts are in `fs.algorithms`, such as `fs.algorithms.fedavg.fedavg`, in
`fs.models`, `fs.data`, `fs.aggregators`, `fs.transforms`, `fs.sampling` and
`fs.schedules`. Whoever writes an algorithm finds the rest of the contract in
`fedjax_sim.core`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fedjax_sim import aggregators as aggregators
  from fedjax_sim import algorithms as algorithms
  from fedjax_sim import data as data
  from fedjax_sim import models as models
  from fedjax_sim import sampling as sampling
  from fedjax_sim import transforms as transforms
  from fedjax_sim.contract.checks import check
  from fedjax_sim.core import (
    Aggregator,
    Algorithm,
    Pass,
    Report,
    Sampler,
    Task,
    Transform,
    Variables,
  )
  from fedjax_sim.core.errors import FedjaxSimError
  from fedjax_sim.core.weights import read_weights, write_weights
  from fedjax_sim.data import FederatedData, FederatedDataset, make_dataset
  from fedjax_sim.distributed import setup
  from fedjax_sim.engine.batching import LocalBatching
  from fedjax_sim.engine.state import RunState
  from fedjax_sim.simulation.hypergradient import (
    Hypergradient,
    hypergradient,
    hypergradient_function,
  )
  from fedjax_sim.simulation.runtime import Runtime
  from fedjax_sim.simulation.simulate import simulate
  from fedjax_sim.simulation.simulator import Simulator
  from fedjax_sim.studies.compare import compare
  from fedjax_sim.studies.opened import load
  from fedjax_sim.studies.study import study
  from fedjax_sim.tasks import function_task, linen_task, nnx_task
  from fedjax_sim.tasks.freezing import named_variables
  from fedjax_sim.tasks.initial import with_initial
  from fedjax_sim.tasks.prediction import predict
  from fedjax_sim.training import schedules
  from fedjax_sim.training.optimizers import Optimizer, optimizer

__all__ = [
  "Aggregator",
  "Algorithm",
  "FederatedData",
  "FederatedDataset",
  "FedjaxSimError",
  "Hypergradient",
  "LocalBatching",
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
  "check",
  "compare",
  "function_task",
  "hypergradient",
  "hypergradient_function",
  "linen_task",
  "load",
  "make_dataset",
  "named_variables",
  "nnx_task",
  "optimizer",
  "predict",
  "read_weights",
  "schedules",
  "setup",
  "simulate",
  "study",
  "with_initial",
  "write_weights",
]

_HOME = {
  "Aggregator": "fedjax_sim.core",
  "Algorithm": "fedjax_sim.core",
  "FederatedData": "fedjax_sim.data",
  "FederatedDataset": "fedjax_sim.data",
  "FedjaxSimError": "fedjax_sim.core.errors",
  "Hypergradient": "fedjax_sim.simulation.hypergradient",
  "LocalBatching": "fedjax_sim.engine.batching",
  "Optimizer": "fedjax_sim.training.optimizers",
  "Pass": "fedjax_sim.core",
  "Report": "fedjax_sim.core",
  "RunState": "fedjax_sim.engine.state",
  "Runtime": "fedjax_sim.simulation.runtime",
  "Sampler": "fedjax_sim.core",
  "Simulator": "fedjax_sim.simulation.simulator",
  "Task": "fedjax_sim.core",
  "Transform": "fedjax_sim.core",
  "Variables": "fedjax_sim.core",
  "check": "fedjax_sim.contract.checks",
  "compare": "fedjax_sim.studies.compare",
  "function_task": "fedjax_sim.tasks",
  "hypergradient": "fedjax_sim.simulation.hypergradient",
  "hypergradient_function": "fedjax_sim.simulation.hypergradient",
  "linen_task": "fedjax_sim.tasks",
  "load": "fedjax_sim.studies.opened",
  "make_dataset": "fedjax_sim.data",
  "named_variables": "fedjax_sim.tasks.freezing",
  "nnx_task": "fedjax_sim.tasks",
  "optimizer": "fedjax_sim.training.optimizers",
  "predict": "fedjax_sim.tasks.prediction",
  "read_weights": "fedjax_sim.core.weights",
  "setup": "fedjax_sim.distributed",
  "simulate": "fedjax_sim.simulation.simulate",
  "study": "fedjax_sim.studies.study",
  "with_initial": "fedjax_sim.tasks.initial",
  "write_weights": "fedjax_sim.core.weights",
}

_MODULES = {
  "aggregators": "fedjax_sim.aggregators",
  "algorithms": "fedjax_sim.algorithms",
  "data": "fedjax_sim.data",
  "models": "fedjax_sim.models",
  "sampling": "fedjax_sim.sampling",
  "schedules": "fedjax_sim.training.schedules",
  "transforms": "fedjax_sim.transforms",
}


def __getattr__(name: str) -> Any:
  """Import a name when it is asked for: `import fedjax_sim` costs nothing."""
  if name in _MODULES:
    return importlib.import_module(_MODULES[name])
  if name not in _HOME:
    raise AttributeError(f"module 'fedjax_sim' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME[name]), name)
