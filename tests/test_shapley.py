"""Shapley values by permutations: closed forms, exact values, errors."""

import itertools
import math

import numpy as np
import pytest

from fedjax_sim.studies.influence import influences, shapley_values
from fedjax_sim.studies.shapley import (
  coalitions,
  contributions,
  estimate,
  permutations,
)


def all_orders(players):
  """Every order, followed by its reverse, and so each of them twice."""
  orders = itertools.permutations(range(players))
  return np.array([way for o in orders for way in (o, o[::-1])])


def exact(players, worth):
  """Shapley's formula over all coalitions, in Python."""
  values = []
  for i in range(players):
    others = [j for j in range(players) if j != i]
    value = 0.0
    for size in range(players):
      chance = 1 / (players * math.comb(players - 1, size))
      for some in itertools.combinations(others, size):
        value += chance * (worth({*some, i}) - worth(set(some)))
    values.append(value)
  return values


def game_of(orders, worth):
  return {c: worth(set(c)) for c in coalitions(orders)}


def test_all_orders_give_the_exact_values():
  rng = np.random.default_rng(1)
  table = {
    frozenset(c): rng.normal()
    for n in range(5)
    for c in itertools.combinations(range(4), n)
  }
  worth = lambda some: table[frozenset(some)]
  orders = all_orders(4)
  found = estimate(orders, [game_of(orders, worth)]).values
  np.testing.assert_allclose(found, exact(4, worth), atol=1e-12)


def test_closed_forms():
  weights = np.array([0.1, 0.5, -0.3, 2.0, 0.0])
  orders = permutations(5, 8, seed=3)
  additive = lambda some: 7 + sum(weights[i] for i in some)
  found = estimate(orders, [game_of(orders, additive)])
  np.testing.assert_allclose(found.values, weights, atol=1e-12)
  np.testing.assert_allclose(found.errors, 0, atol=1e-12)
  # (sum of w)^2 is worth w_i times the sum of all w to each; a pair of an order
  # and its reverse is exact, as those before in one come after in the other.
  square = lambda some: sum(weights[i] for i in some) ** 2
  found = estimate(orders, [game_of(orders, square)])
  np.testing.assert_allclose(found.values, weights * weights.sum(), atol=1e-12)
  # An airport's runway, Littlechild and Owen 1973: each increment is shared by
  # those who need it.
  costs = np.array([1.0, 3.0, 3.5, 6.0])
  runway = lambda some: max((costs[i] for i in some), default=0.0)
  shares = np.cumsum(np.diff(costs, prepend=0) / np.arange(4, 0, -1))
  orders = all_orders(4)
  found = estimate(orders, [game_of(orders, runway)])
  np.testing.assert_allclose(found.values, shares, atol=1e-12)


def test_values_are_unbiased_and_errors_are_true():
  rng = np.random.default_rng(0)
  weights = rng.uniform(0.1, 2, 6)
  worth = lambda some: sum(weights[i] for i in some) ** 0.5
  truth = np.array(exact(6, worth))
  table = game_of(all_orders(6), worth)
  found = [estimate(permutations(6, 40, seed=s), [table]) for s in range(400)]
  values = np.array([f.values for f in found])
  np.testing.assert_allclose(values.sum(1), worth(set(range(6))), atol=1e-12)
  scores = (values - truth) / np.array([f.errors for f in found])
  assert abs(scores.mean()) < 0.15
  assert 0.9 < scores.std() < 1.2  # t with 19 degrees of freedom: 1.06
  # Pairs beat as many orders drawn by themselves, where gains diminish.
  alone = [
    contributions(
      np.stack([rng.permutation(6) for _ in range(40)]), table
    ).mean(0)
    for _ in range(400)
  ]
  ratio = np.var(alone, axis=0).sum() / np.var(values, axis=0).sum()
  assert ratio > 1.8


def test_coalitions_are_distinct_and_begin_with_all():
  orders = permutations(4, 6, seed=1)
  found = coalitions(orders)
  assert found[0] == frozenset(range(4))
  assert len(set(found)) == len(found)
  assert frozenset() in found
  np.testing.assert_array_equal(orders[1::2], orders[::2, ::-1])


def test_errors_of_seeds_and_of_permutations():
  """Seeds that differ by a player's worth alone: an error of seeds only."""
  orders = permutations(3, 4, seed=0)
  games = [
    game_of(orders, lambda some, s=s: sum(1.0 + s * (i == 0) for i in some))
    for s in (0.0, 1.0, 5.0)
  ]
  first, second, _ = shapley_values(games, orders)
  assert (first.value, second.value) == pytest.approx((3, 1))
  deviation = np.std([0, 1, 5], ddof=1) / 3**0.5
  assert first.errors == pytest.approx((0, deviation))
  games[1] = {**games[1], frozenset(range(3)): math.nan}  # it diverged
  assert shapley_values(games, orders)[0].seeds == 2
  everyone = frozenset(range(3))
  (lost, *_) = influences(
    [{everyone: 3.0, everyone - {0}: 2.0}, {everyone: 5.0}], 3
  )
  assert (lost.value, lost.seeds) == (1.0, 1)
  assert math.isnan(lost.errors[0])


@pytest.mark.parametrize(
  ("players", "count", "told"),
  [(3, 5, "shapley=5 is odd"), (3, 0, "shapley=0"), (1, 2, "players=1")],
)
def test_other_numbers_are_refused(players, count, told):
  with pytest.raises(ValueError, match=told):
    permutations(players, count, 0)
