"""q-FedAvg against algorithm 2 of its paper, in numpy."""

import numpy as np
import pytest
import scipy.optimize

from fedjax_sim.algorithms.q_fedavg import q_fedavg
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from logistic import DIM, TASK, all_rows, cohort, loss, simulate, trained
from problems import (
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

ETA = 0.3


def by_hand(q, rounds):
  w, lipschitz = np.zeros(DIM), 1 / ETA
  for r in range(rounds):
    deltas, hs = [], []
    for k in cohort(r):
      step = lipschitz * (w - trained(w, k, ETA))
      value = loss(w, all_rows(k))
      deltas.append(value**q * step)
      hs.append(q * value ** (q - 1) * step @ step + lipschitz * value**q)
    w = w - np.sum(deltas, axis=0) / np.sum(hs)
  return w


def fedavg_by_hand(rounds):
  w = np.zeros(DIM)
  for r in range(rounds):
    w = np.mean([trained(w, k, ETA) for k in cohort(r)], axis=0)
  return w


def test_it_is_the_papers_recursion_and_fedavg_at_0():
  simulator, state = simulate(q_fedavg(TASK, sgd(ETA), sgd(1.0), q=2.0), 5)
  found = params_of(simulator, state)["w"]
  np.testing.assert_allclose(found, by_hand(2.0, 5), atol=2e-6)
  plain = train(simulator, 5, hparams_of(simulator, q=0.0))
  found = params_of(simulator, plain)["w"]
  np.testing.assert_allclose(found, fedavg_by_hand(5), atol=2e-6)
  # A rate of 0, as at the end of a schedule, moves nothing.
  still = hparams_of(simulator, client={"learning_rate": 0.0})
  np.testing.assert_array_equal(
    params_of(simulator, train(simulator, 1, still))["w"], 0
  )


def test_a_large_q_evens_losses_out():
  curvatures, centers = np.array([1.0, 4.0]), np.array([0.0, 1.0])
  losses = lambda x: curvatures / 2 * (x - centers) ** 2
  task = quadratic(1)
  simulator = make_simulator(
    task,
    q_fedavg(task, sgd(0.2), sgd(1.0)),
    quadratic_data(centers[:, None], curvatures),
    batching=LocalBatching(batch_size=1, steps=1),
    rounds_per_dispatch=100,
  )
  spreads = []
  for q in (0.0, 1.0, 10.0):
    state = train(simulator, 400, hparams_of(simulator, q=q))
    (x,) = params_of(simulator, state)["w"]
    slope = lambda x, q=q: losses(x) ** q @ (curvatures * (x - centers))
    np.testing.assert_allclose(
      x, scipy.optimize.brentq(slope, 1e-3, 1 - 1e-3), atol=1e-3
    )
    spreads.append(np.ptp(losses(x)))
  assert spreads[0] > 2 * spreads[1]
  assert spreads[1] > 4 * spreads[2]


def test_what_it_refuses():
  with pytest.raises(ValueError, match=r"q=-1"):
    q_fedavg(TASK, sgd(ETA), sgd(1.0), q=-1.0)
  with pytest.raises(ValueError, match=r"client_optimizer is not plain sgd"):
    q_fedavg(TASK, optimizer("adam", learning_rate=0.1), sgd(1.0))
