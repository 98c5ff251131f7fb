"""Experiment trackers: where the metrics of a run are sent to.

`TRACKERS` lists them by the name that a config uses. A tracker's functions are
called by `fedjax_sim/run/delivery.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fedjax_sim.reporting.trackers import mlflow, tensorboard, wandb
from fedjax_sim.reporting.trackers.protocol import (
  Opened,
  Row,
  RunFacts,
  Status,
  Tracker,
)
from fedjax_sim.reporting.trackers.selection import Selection

__all__ = [
  "TRACKERS",
  "Opened",
  "Row",
  "RunFacts",
  "Selection",
  "Status",
  "Tracker",
]

TRACKERS: Mapping[str, Callable[..., Tracker]] = MappingProxyType(
  {
    "mlflow": mlflow.mlflow,
    "tensorboard": tensorboard.tensorboard,
    "wandb": wandb.wandb,
  }
)
