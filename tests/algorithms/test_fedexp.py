"""FedExP against algorithm 1 of its paper, in numpy."""

import numpy as np
import pytest

from fedjax_sim import aggregators, transforms
from fedjax_sim.algorithms.fedexp import fedexp
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from logistic import DIM, TASK, cohort, simulate, trained
from problems import params_of, sgd

ETA, EPSILON = 0.3, 0.002


def by_hand(rounds, longest=np.inf):
  """The model, and eta_g of every round, of updates clipped to a norm."""
  w, lengths = np.zeros(DIM), []
  for r in range(rounds):
    deltas = np.array([trained(w, k, ETA) - w for k in cohort(r)])
    norms = np.linalg.norm(deltas, axis=1, keepdims=True)
    deltas *= np.minimum(1, longest / norms)
    mean = deltas.mean(axis=0)
    squares = np.sum(deltas**2)
    ratio = squares / (2 * len(deltas) * (mean @ mean + EPSILON))
    lengths.append(max(1.0, ratio))
    w = w + lengths[-1] * mean
  return w, lengths


@pytest.mark.parametrize("longest", [np.inf, 0.3])
def test_it_is_the_papers_recursion(longest):
  """Norms are those of what the server gets, after transforms."""
  algorithm = fedexp(TASK, sgd(ETA), sgd(1.0), epsilon=EPSILON)
  clipping = [transforms.clip(longest)] if np.isfinite(longest) else []
  simulator, _ = simulate(algorithm, 0, transforms=clipping)
  state, rows = simulator.init(), []
  for out in simulator.run(state, 6):
    state = out.state
    rows += out.rows
  w, lengths = by_hand(6, longest)
  assert max(lengths) > 1 == min(lengths)
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=5e-6)
  np.testing.assert_allclose(state.server.eta_g, lengths[-1], rtol=1e-5)
  assert simulator.traffic.up == 4 * DIM + 4 + 4  # a weight, and the square
  shown = [row["eta_g"] for row in rows]
  np.testing.assert_allclose(shown, [1.0, *lengths[:-1]], rtol=1e-5)


def test_squared_norms_are_released_with_the_mean_alone():
  algorithm = fedexp(TASK, sgd(ETA), sgd(1.0))
  with pytest.raises(ValueError, match=r"set aggregator.name='weighted"):
    simulate(algorithm, 1, aggregator=aggregators.median())
  settings = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=1.0, denominator=3.0
  )
  with pytest.raises(ValueError, match=r"set privacy.statistics_norm"):
    simulate(with_central_dp(algorithm, settings), 1)
