"""The contract: tasks, algorithms, transforms, aggregators, samplers, keys.

They are NamedTuples of pure functions, and can all be imported from here. The
other modules are what every package needs: checks, errors, trees, files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fedjax_sim.core.algorithm import (
    Aggregate,
    Algorithm,
    Client,
    Context,
    Members,
    Pass,
    PrivacySpec,
    Report,
    Requirements,
    Survey,
  )
  from fedjax_sim.core.keys import Purpose, key_for, noise_key_for
  from fedjax_sim.core.sampler import Participation, Sampler
  from fedjax_sim.core.task import (
    Batch,
    Joint,
    Loss,
    Metric,
    PerExample,
    Task,
    Variables,
    evaluate_batch,
    mean_loss,
    sum_metrics,
  )
  from fedjax_sim.core.tree import in_float32
  from fedjax_sim.core.types import Array, Examples, HParams, Key, PyTree
  from fedjax_sim.core.update import (
    AggregationContext,
    Aggregator,
    Shares,
    Transform,
    TransformResult,
  )

__all__ = [
  "Aggregate",
  "AggregationContext",
  "Aggregator",
  "Algorithm",
  "Array",
  "Batch",
  "Client",
  "Context",
  "Examples",
  "HParams",
  "Joint",
  "Key",
  "Loss",
  "Members",
  "Metric",
  "Participation",
  "Pass",
  "PerExample",
  "PrivacySpec",
  "Purpose",
  "PyTree",
  "Report",
  "Requirements",
  "Sampler",
  "Shares",
  "Survey",
  "Task",
  "Transform",
  "TransformResult",
  "Variables",
  "evaluate_batch",
  "in_float32",
  "key_for",
  "mean_loss",
  "noise_key_for",
  "sum_metrics",
]

_HOME = {
  "Aggregate": "fedjax_sim.core.algorithm",
  "AggregationContext": "fedjax_sim.core.update",
  "Aggregator": "fedjax_sim.core.update",
  "Algorithm": "fedjax_sim.core.algorithm",
  "Array": "fedjax_sim.core.types",
  "Batch": "fedjax_sim.core.task",
  "Client": "fedjax_sim.core.algorithm",
  "Context": "fedjax_sim.core.algorithm",
  "Examples": "fedjax_sim.core.types",
  "HParams": "fedjax_sim.core.types",
  "Joint": "fedjax_sim.core.task",
  "Key": "fedjax_sim.core.types",
  "Loss": "fedjax_sim.core.task",
  "Members": "fedjax_sim.core.algorithm",
  "Metric": "fedjax_sim.core.task",
  "Participation": "fedjax_sim.core.sampler",
  "Pass": "fedjax_sim.core.algorithm",
  "PerExample": "fedjax_sim.core.task",
  "Purpose": "fedjax_sim.core.keys",
  "PyTree": "fedjax_sim.core.types",
  "PrivacySpec": "fedjax_sim.core.algorithm",
  "Report": "fedjax_sim.core.algorithm",
  "Requirements": "fedjax_sim.core.algorithm",
  "Survey": "fedjax_sim.core.algorithm",
  "Sampler": "fedjax_sim.core.sampler",
  "Shares": "fedjax_sim.core.update",
  "Task": "fedjax_sim.core.task",
  "Transform": "fedjax_sim.core.update",
  "TransformResult": "fedjax_sim.core.update",
  "Variables": "fedjax_sim.core.task",
  "evaluate_batch": "fedjax_sim.core.task",
  "in_float32": "fedjax_sim.core.tree",
  "key_for": "fedjax_sim.core.keys",
  "mean_loss": "fedjax_sim.core.task",
  "noise_key_for": "fedjax_sim.core.keys",
  "sum_metrics": "fedjax_sim.core.task",
}


def __getattr__(name: str) -> Any:
  """Import a name when it is asked for, as some modules need no JAX."""
  if name not in _HOME:
    raise AttributeError(f"module 'fedjax_sim.core' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME[name]), name)
