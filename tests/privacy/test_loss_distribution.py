"""Composed losses: against dp-accounting on the same grid, and by hand."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution, privacy_loss_mechanism
from scipy import stats

from fedjax_sim.privacy.accounting.loss_distribution import LossDistribution


def ours(loss, interval):
  bounds = loss.connect_dots_bounds()
  lowest = math.floor(bounds.epsilon_lower / interval)
  highest = math.ceil(bounds.epsilon_upper / interval)
  losses = interval * np.arange(lowest, highest + 1)
  deltas = np.asarray(loss.get_delta_for_epsilon(losses))
  return LossDistribution(interval, lowest, deltas)


@pytest.mark.parametrize(
  ("spread", "rate", "interval"),
  [(1.0, 0.02, 1e-3), (0.3, 0.2, 5e-3), (10.0, 1.0, 1e-3), (1.0, 1e-4, 1e-4)],
)
@pytest.mark.parametrize("adjacency", ["REMOVE", "ADD"])
def test_as_dp_accounting(spread, rate, interval, adjacency):
  kind = privacy_loss_mechanism.AdjacencyType[adjacency]
  loss = privacy_loss_mechanism.GaussianPrivacyLoss(
    spread, sampling_prob=rate, adjacency_type=kind
  )
  both = privacy_loss_distribution.from_gaussian_mechanism(
    spread, sampling_prob=rate, value_discretization_interval=interval
  )
  theirs = both._pmf_remove if adjacency == "REMOVE" else both._pmf_add
  mine = ours(loss, interval)
  for count in (1, 2, 37, 1000):
    composed = theirs.self_compose(count)
    for delta in (1e-2, 1e-5, 1e-8):
      expected = composed.get_epsilon_for_delta(delta)
      if expected > 700:
        continue  # theirs is coarser there, where exp(-epsilon) is 0
      assert mine.epsilon(count, delta) == pytest.approx(
        expected, rel=1e-4, abs=1e-9
      )


def test_randomized_response():
  """Losses of +1 and -1 alone: the sum of n is a binomial."""
  yes = math.e / (1 + math.e)
  loss = LossDistribution(
    1.0, -1, np.array([1 - 1 / math.e, yes - (1 - yes), 0.0])
  )
  count = 9
  sums = 2 * np.arange(count + 1) - count
  chances = stats.binom.pmf(np.arange(count + 1), count, yes)
  for epsilon in (0.3, 2.5, 6.9):
    delta = np.sum(np.maximum(0, -np.expm1(epsilon - sums)) * chances)
    assert loss.epsilon(count, delta) == pytest.approx(epsilon, rel=1e-9)
  assert loss.epsilon(count, 1.0) == 0


def test_an_infinite_loss():
  loss = LossDistribution(1.0, 0, np.array([0.5, 0.01]))
  assert loss.epsilon(1, 0.009) == math.inf
  assert loss.epsilon(1, 0.011) < math.inf
  assert loss.epsilon(3, 0.029) == math.inf
