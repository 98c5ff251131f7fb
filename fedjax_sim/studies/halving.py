"""Successive halving: after so many rounds the worst settings end.

Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and
hyperparameter optimization" (arXiv 1502.07943): all settings get a small
budget, the best 1 / eta of them go on with eta times as much, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rungs(points: int, rounds: int, eta: int, every: int) -> list[int]:
  """Return the rounds after which settings are compared; the last one too.

  Args:
    points: how many settings begin.
    rounds: of a setting that is never ended.
    eta: of so many settings one goes on.
    every: rungs are multiples of it, except the last: the rounds that are
      evaluated.

  Example:
    >>> rungs(points=9, rounds=90, eta=3, every=10)
    [10, 30, 90]
  """
  found = {rounds}
  budget, left = float(rounds), points
  while left > 1:
    left = kept(left, eta)
    budget /= eta
    rung = max(every, every * math.ceil(budget / every - 1e-9))
    if rung < rounds:
      found.add(rung)
  return sorted(found)


def kept(points: int, eta: int) -> int:
  """Return how many of so many settings go on."""
  return -(-points // eta)


def best(
  scores: Sequence[float], eta: int, *, higher_is_better: bool
) -> list[int]:
  """Return the positions of the settings that go on, in order.

  Args:
    scores: of all settings; NaN, of one that diverged, is the worst. Of equal
      ones the first goes on.
    eta: of so many settings one goes on.
    higher_is_better: direction of the scores.
  """
  sign = -1.0 if higher_is_better else 1.0
  ranked = sorted(
    range(len(scores)),
    key=lambda i: (
      math.inf if math.isnan(scores[i]) else sign * scores[i],
      i,
    ),
  )
  return sorted(ranked[: kept(len(scores), eta)])
