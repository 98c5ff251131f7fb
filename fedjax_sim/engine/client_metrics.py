"""Metrics of every client of an evaluation set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedjax_sim.core import Joint, PyTree
from fedjax_sim.core.metric_names import PERCENTILES
from fedjax_sim.core.types import EMPTY


class ClientMetrics(NamedTuple):
  """Metrics of every client of a set.

  Attributes:
    total: name -> shape=(num_clients,), float64; summed over its examples. Of a
      metric that is no mean, the number itself.
    weight: name -> shape=(num_clients,), float64. Of a metric that is no mean,
      1, or 0 where there is no such number.
    overall_of: name -> the number of all examples together, NaN if there is
      none, of every metric that is no mean.
    unspread: names of which there is no mean and no percentile over clients, as
      they are cells of a table.
  """

  total: dict[str, np.ndarray]
  weight: dict[str, np.ndarray]
  overall_of: Mapping[str, float] = EMPTY
  unspread: frozenset[str] = frozenset()

  def per_client(self) -> dict[str, np.ndarray]:
    """Return each client's mean, or its number that is none; NaN without."""
    means = {}
    for name, total in self.total.items():
      weight = self.weight[name]
      some = weight > 0
      means[name] = np.where(some, total / np.where(some, weight, 1), np.nan)
    return means

  def overall(self) -> dict[str, float]:
    """Return the mean over all examples, or their number that is none.

    NaN if no example has weight, or there is no such number.
    """
    means = dict[str, float]()
    for name, total in self.total.items():
      if name in self.overall_of:
        means[name] = self.overall_of[name]
        continue
      weight = self.weight[name].sum()
      means[name] = float(total.sum() / weight) if weight > 0 else math.nan
    return means

  def summary(self, prefix: str) -> dict[str, float]:
    """Overall numbers, and mean and percentiles over clients.

    Clients for which there is no such number do not count.

    Args:
      prefix: e.g. "seen" gives `seen/accuracy` (over examples),
        `seen/accuracy/mean` (over clients), `seen/accuracy/p10`, and what
        `over_clients` returns.
    """
    row = {}
    overall = self.overall()
    for name, values in self.per_client().items():
      row[f"{prefix}/{name}"] = overall[name]
      if name in self.unspread:
        continue
      values = values[self.weight[name] > 0]
      if not len(values):
        values = np.array([np.nan])
      for statistic, number in over_clients(values).items():
        row[f"{prefix}/{name}/{statistic}"] = number
    return row


def over_clients(values: np.ndarray) -> dict[str, float]:
  """Return how a metric is distributed over clients, `STATISTICS`.

  Mean and percentiles; the means of the lowest and of the highest tenth of the
  clients, rounded up (Li et al. 2020, "Fair resource allocation in federated
  learning", arXiv 1905.10497, reports both); the standard deviation, whose
  square is the variance; the Gini coefficient, from 0 where all are equal to
  1 - 1 / n where one has everything, NaN where some are below 0.

  Args:
    values: shape=(clients,), float64, a client's each; not empty.

  Example:
    >>> over_clients(np.array([0.0, 0.0, 3.0]))["gini"]
    0.6666666666666666
  """
  ordered = np.sort(values)  # a NaN comes last, and is not to hide
  count = len(ordered)
  tenth = -(-count // 10)
  known = not np.isnan(ordered[-1])
  gini = math.nan
  # A loss may be infinite; there is no standard deviation then.
  with np.errstate(invalid="ignore", over="ignore"):
    if known and ordered[0] >= 0:
      ranks = 2 * np.arange(1, count + 1) - count - 1
      total = count * ordered.sum()
      gini = float(ranks @ ordered / total) if total > 0 else 0.0
    return {
      "mean": float(values.mean()),
      **{f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES},
      "lowest10": float(ordered[:tenth].mean()) if known else math.nan,
      "highest10": float(ordered[-tenth:].mean()),
      "std": float(values.std()),
      "gini": gini,
    }


def told(metric: str, prefix: str, *, spread: bool = True) -> list[str]:
  """Return the names that `ClientMetrics.summary` gives a metric.

  Args:
    metric: its name.
    prefix: as in `ClientMetrics.summary`.
    spread: whether it is not of `ClientMetrics.unspread`.
  """
  one = {metric: np.ones(1)}
  unspread = frozenset[str]() if spread else frozenset([metric])
  return list(ClientMetrics(one, one, EMPTY, unspread).summary(prefix))


def number_names(metric: str, joint: Joint, values: PyTree) -> list[str]:
  """Return the names of a joint metric's numbers.

  Args:
    metric: its name.
    joint: what makes them.
    values: of examples, or their shapes and dtypes.
  """
  if joint.names is None:
    return [metric]
  return [f"{metric}/{name}" for name in joint.names(values)]


def joint_metrics(
  means: ClientMetrics,
  joint: Mapping[str, tuple[Joint, PyTree]],
  num_clients: int,
  offsets: np.ndarray | None,
) -> ClientMetrics:
  """Return the metrics with the numbers of joint ones.

  Args:
    means: those that are means.
    joint: name -> what makes the numbers, and the values of all examples of the
      set, leaves (examples, ...).
    num_clients: of the set.
    offsets: shape=(num_clients + 1,); client i owns the values from
      `offsets[i]` to `offsets[i + 1]`. None: compute the overall numbers alone.
  """
  if not joint:
    return means
  total, weight = dict(means.total), dict(means.weight)
  overall = dict[str, float]()
  unspread = set[str]()
  for metric, (own, tree) in joint.items():
    names = number_names(metric, own, tree)
    unspread.update(names if own.names is not None else ())
    for name, number in _numbers(own, names, tree).items():
      overall[name] = math.nan if number is None else number
      total[name], weight[name] = np.zeros(num_clients), np.zeros(num_clients)
    if offsets is None:
      continue
    for i in np.flatnonzero(np.diff(offsets)).tolist():
      rows = slice(*offsets[i : i + 2])
      part = jax.tree.map(lambda x, rows=rows: x[rows], tree)
      for name, number in _numbers(own, names, part).items():
        if number is not None:
          total[name][i], weight[name][i] = number, 1
  return ClientMetrics(total, weight, overall, frozenset(unspread))


def _numbers(
  joint: Joint, names: Sequence[str], values: PyTree
) -> dict[str, float | None]:
  """Return name -> number of some examples, in the order of `names`."""
  made = joint.number(values)
  if joint.names is None:
    return dict.fromkeys(names, made)  # type: ignore[arg-type]
  assert isinstance(made, Mapping)
  return dict(zip(names, (made[k] for k in joint.names(values)), strict=True))
