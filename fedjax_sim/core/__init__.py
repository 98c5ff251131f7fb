"""The contract: tasks, algorithms, transforms, aggregators, samplers, keys.

They are NamedTuples of pure functions, and can all be imported from here. The
other modules are what every package needs: checks, errors, trees, files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fedjax_sim.core.algorithm import (
    Aggregate,
    Aggregator,
    Algorithm,
    Array,
    Batch,
    Client,
    Context,
    Examples,
    HParams,
    Key,
    Loss,
    Members,
    Metric,
    Pass,
    Purpose,
    PyTree,
    Release,
    Report,
    Roll,
    Task,
    Transform,
    Variables,
    in_float32,
    key_for,
    mean_loss,
    noise_key_for,
    sum_metrics,
  )

__all__ = [
  "Aggregate",
  "Aggregator",
  "Algorithm",
  "Array",
  "Batch",
  "Client",
  "Context",
  "Examples",
  "HParams",
  "Key",
  "Loss",
  "Members",
  "Metric",
  "Pass",
  "Purpose",
  "PyTree",
  "Release",
  "Report",
  "Roll",
  "Task",
  "Transform",
  "Variables",
  "in_float32",
  "key_for",
  "mean_loss",
  "noise_key_for",
  "sum_metrics",
]

_HOME = {
  "Aggregate": "fedjax_sim.core.algorithm",
  "Aggregator": "fedjax_sim.core.algorithm",
  "Algorithm": "fedjax_sim.core.algorithm",
  "Array": "fedjax_sim.core.algorithm",
  "Batch": "fedjax_sim.core.algorithm",
  "Client": "fedjax_sim.core.algorithm",
  "Context": "fedjax_sim.core.algorithm",
  "Examples": "fedjax_sim.core.algorithm",
  "HParams": "fedjax_sim.core.algorithm",
  "Key": "fedjax_sim.core.algorithm",
  "Loss": "fedjax_sim.core.algorithm",
  "Members": "fedjax_sim.core.algorithm",
  "Metric": "fedjax_sim.core.algorithm",
  "Pass": "fedjax_sim.core.algorithm",
  "Purpose": "fedjax_sim.core.algorithm",
  "PyTree": "fedjax_sim.core.algorithm",
  "Release": "fedjax_sim.core.algorithm",
  "Report": "fedjax_sim.core.algorithm",
  "Roll": "fedjax_sim.core.algorithm",
  "Task": "fedjax_sim.core.algorithm",
  "Transform": "fedjax_sim.core.algorithm",
  "Variables": "fedjax_sim.core.algorithm",
  "in_float32": "fedjax_sim.core.algorithm",
  "key_for": "fedjax_sim.core.algorithm",
  "mean_loss": "fedjax_sim.core.algorithm",
  "noise_key_for": "fedjax_sim.core.algorithm",
  "sum_metrics": "fedjax_sim.core.algorithm",
}


def __getattr__(name: str) -> Any:
  """Import a name when it is asked for, as some modules need no JAX."""
  if name not in _HOME:
    raise AttributeError(f"module 'fedjax_sim.core' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME[name]), name)
