"""Systematic sampling: a fixed number of clients, each as likely as it should.

Madow 1949, "On the theory of systematic sampling, II": clients lie side by side
on a line, client i as long as its probability; points a unit apart, from a
random place on, hit whom they hit. Neighbors on the line are seldom drawn
together, so an order in which neighbors are alike is a stratification.
"""

from __future__ import annotations

import numpy as np


def draw(
  rng: np.random.Generator, probabilities: np.ndarray, order: np.ndarray
) -> np.ndarray:
  """Return the clients that are hit, sorted, int64, no duplicates.

  Args:
    rng: gives the random place.
    probabilities: shape=(clients,), of each to be drawn, in [0, 1]; their sum
      is a whole number, which is how many are drawn.
    order: shape=(clients,); how they lie on the line.
  """
  count = round(float(probabilities.sum()))
  ends = np.cumsum(probabilities[order])
  ends *= count / ends[-1]  # so that rounding errors hit nobody twice
  points = rng.uniform() + np.arange(count)
  hit = np.searchsorted(ends, points, side="right")
  return np.sort(order[np.minimum(hit, len(order) - 1)])


def inclusion(scores: np.ndarray, size: int) -> np.ndarray:
  """Return probabilities of being drawn, in proportion to scores as far as may.

  Those that would be above 1 are 1, and the others share what is left.

  Example:
    >>> inclusion(np.array([8.0, 1.0, 1.0]), 2).tolist()
    [1.0, 0.5, 0.5]

  Args:
    scores: shape=(clients,), >= 0.
    size: how many are drawn, at most as many as have a score above 0.
  """
  probabilities = np.zeros(len(scores))
  rest = np.ones(len(scores), bool)
  while True:
    left = size - np.count_nonzero(~rest)
    if not left:  # the others have a score of 0, perhaps, or are none
      probabilities[rest] = 0.0
      return probabilities
    probabilities[rest] = left * scores[rest] / scores[rest].sum()
    over = rest & (probabilities > 1)
    if not over.any():
      return probabilities
    probabilities[over], rest = 1.0, rest & ~over
