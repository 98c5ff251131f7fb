"""Metrics of every client of an evaluation set."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedjax_sim.core.returned import PERCENTILES


class ClientMetrics(NamedTuple):
  """Metrics of every client of a set.

  Attributes:
    total: name -> shape=(num_clients,), float64; summed over its examples.
    weight: name -> shape=(num_clients,), float64.
  """

  total: dict[str, np.ndarray]
  weight: dict[str, np.ndarray]

  def per_client(self) -> dict[str, np.ndarray]:
    """Return each client's mean; NaN for a client without examples."""
    means = {}
    for name, total in self.total.items():
      weight = self.weight[name]
      some = weight > 0
      means[name] = np.where(some, total / np.where(some, weight, 1), np.nan)
    return means

  def overall(self) -> dict[str, float]:
    """Return the mean over all examples; NaN if none has weight."""
    means = {}
    for name, total in self.total.items():
      weight = self.weight[name].sum()
      means[name] = float(total.sum() / weight) if weight > 0 else math.nan
    return means

  def summary(self, prefix: str) -> dict[str, float]:
    """Overall means, and mean and percentiles over clients.

    Args:
      prefix: e.g. "seen" gives `seen/accuracy` (over examples),
        `seen/accuracy/mean` (over clients), `seen/accuracy/p10`, ...
    """
    row = {}
    overall = self.overall()
    for name, values in self.per_client().items():
      row[f"{prefix}/{name}"] = overall[name]
      values = values[self.weight[name] > 0]
      if not len(values):
        values = np.array([np.nan])
      row[f"{prefix}/{name}/mean"] = float(values.mean())
      for q in PERCENTILES:
        row[f"{prefix}/{name}/p{q}"] = float(np.percentile(values, q))
    return row


def told(metric: str, prefix: str) -> list[str]:
  """Return the names that `ClientMetrics.summary` gives a metric."""
  one = {metric: np.ones(1)}
  return list(ClientMetrics(one, one).summary(prefix))
