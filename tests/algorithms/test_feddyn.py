"""FedDyn against algorithm 1 of its paper, in numpy.

`test_scaffold.py` has the optimum that it reaches and FedAvg misses.
"""

import numpy as np
import pytest

from fedjax_sim.algorithms.feddyn import feddyn
from logistic import DIM, SIZES, TASK, cohort, gradient, simulate, trained
from problems import params_of, sgd

ETA, ALPHA, M = 0.3, 0.4, len(SIZES)


def by_hand(rounds):
  """theta, h, and the clients' gradients."""
  theta, h, g = np.zeros(DIM), np.zeros(DIM), np.zeros((M, DIM))
  for r in range(rounds):
    ends = {}
    for k in cohort(r):
      slope = lambda y, rows, start=theta, own=g[k]: (
        gradient(y, rows) - own + ALPHA * (y - start)
      )
      ends[k] = trained(theta, k, ETA, slope)
    for k, end in ends.items():
      g[k] -= ALPHA * (end - theta)
    h -= ALPHA / M * sum(end - theta for end in ends.values())
    theta = np.mean([*ends.values()], axis=0) - h / ALPHA
  return theta, h, g


def test_it_is_the_papers_recursion():
  algorithm = feddyn(TASK, sgd(ETA), sgd(1.0), alpha=ALPHA)
  simulator, state = simulate(algorithm, 5)
  theta, h, g = by_hand(5)
  np.testing.assert_allclose(params_of(simulator, state)["w"], theta, atol=1e-5)
  np.testing.assert_allclose(state.server.h["w"], h, atol=1e-5)
  np.testing.assert_allclose(state.clients[0]["w"][:M], g, atol=1e-5)


def test_without_a_regularizer_there_is_none():
  with pytest.raises(ValueError, match=r"alpha=0"):
    feddyn(TASK, sgd(ETA), sgd(1.0), alpha=0.0)
