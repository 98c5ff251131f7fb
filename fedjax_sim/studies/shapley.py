"""Shapley values by sampled permutations, with their standard errors.

Ghorbani and Zou 2019, "Data Shapley: equitable valuation of data for machine
learning" (arXiv 1904.02868), algorithm 1 without truncation; permutations come
in pairs of one and its reverse (Mitchell et al. 2022, "Sampling permutations
for Shapley value estimation", arXiv 2104.12199, section 4.1). In numpy; nothing
here knows of runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_sim.core import validate

Coalition = frozenset[int]


class Shapley(NamedTuple):
  """Estimates of all players.

  Attributes:
    values: shape=(players,).
    errors: shape=(players,); standard errors over pairs of permutations, which
      say nothing of the luck of seeds. NaN of a single pair.
  """

  values: np.ndarray
  errors: np.ndarray


def permutations(players: int, count: int, seed: int) -> np.ndarray:
  """Draw orders of players: every other one is that before it, reversed.

  A player who comes early in one comes late in the other. So where a player
  adds the less the more are there, as it is with data, errors cancel.

  Args:
    players: how many, >= 2.
    count: of orders, even, >= 2.
    seed: of the draws.

  Returns:
    shape=(count, players), int64.

  Raises:
    TypeError, ValueError: the count is odd or too small.
  """
  validate.integer("shapley: players", players, ge=2)
  if validate.integer("shapley", count, ge=2) % 2:
    raise ValueError(
      f"shapley={count} is odd; permutations come in pairs, so give an even"
      " number."
    )
  rng = np.random.default_rng((seed, players))
  drawn = [rng.permutation(players) for _ in range(count // 2)]
  return np.stack([way for order in drawn for way in (order, order[::-1])])


def coalitions(orders: np.ndarray) -> list[Coalition]:
  """Return the coalitions that orders form, each once; all players are first.

  Args:
    orders: shape=(orders, players), as `permutations` returns them.
  """
  count = orders.shape[1]
  found = dict.fromkeys([frozenset(range(count))])
  for order in orders.tolist():
    found |= dict.fromkeys(frozenset(order[:n]) for n in range(count + 1))
  return list(found)


def contributions(
  orders: np.ndarray, worth: Mapping[Coalition, float]
) -> np.ndarray:
  """Return what each player adds to those before it in each order.

  Args:
    orders: shape=(orders, players).
    worth: of each of their coalitions, the empty one among them.

  Returns:
    shape=(orders, players); each row sums to the worth of all, less that of
    nobody.
  """
  added = np.zeros(orders.shape)
  for row, order in zip(added, orders.tolist(), strict=True):
    values = [worth[frozenset(order[:n])] for n in range(len(order) + 1)]
    row[order] = np.diff(values)
  return added


def estimate(
  orders: np.ndarray, worths: Sequence[Mapping[Coalition, float]]
) -> Shapley:
  """Return the Shapley values of a game, or the mean of several ones'.

  Args:
    orders: shape=(orders, players), in pairs.
    worths: of each game the worth of each coalition.

  Example:
    orders = permutations(3, 10, seed=0)
    estimate(orders, [{c: len(c) ** 0.5 for c in coalitions(orders)}])
  """
  added = np.mean([contributions(orders, worth) for worth in worths], axis=0)
  pairs = added.reshape(-1, 2, added.shape[1]).mean(axis=1)
  count = len(pairs)
  errors = np.full(added.shape[1], math.nan)
  if count > 1:
    errors = pairs.std(axis=0, ddof=1) / math.sqrt(count)
  return Shapley(pairs.mean(axis=0), errors)
