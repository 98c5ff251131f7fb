"""SCAFFOLD against algorithm 1 of its paper, in numpy."""

import jax
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.feddyn import feddyn
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from logistic import (
  DIM,
  SIZES,
  TASK,
  all_rows,
  batches,
  cohort,
  gradient,
  model,
  simulate,
)
from problems import (
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

ETA_L, ETA_G = 0.3, 0.7


def by_hand(option, rounds):
  """x, c and all c_i."""
  x, c, c_i = np.zeros(DIM), np.zeros(DIM), np.zeros((len(SIZES), DIM))
  for r in range(rounds):
    delta_y, delta_c = [], []
    for i in cohort(r):
      y = x.copy()
      for rows in batches(i):
        y = y - ETA_L * (gradient(y, rows) - c_i[i] + c)
      if option == "I":
        new = gradient(x, all_rows(i))
      else:
        new = c_i[i] - c + (x - y) / (len(batches(i)) * ETA_L)
      delta_y.append(y - x)
      delta_c.append(new - c_i[i])
      c_i[i] = new
    x = x + ETA_G * np.mean(delta_y, axis=0)
    c = c + len(cohort(r)) / len(SIZES) * np.mean(delta_c, axis=0)
  return x, c, c_i


@pytest.mark.parametrize("option", ["I", "II"])
def test_it_is_the_papers_recursion(option):
  algorithm = scaffold(TASK, sgd(ETA_L), sgd(ETA_G), option=option)
  simulator, state = simulate(algorithm, 5)
  x, c, c_i = by_hand(option, 5)
  np.testing.assert_allclose(params_of(simulator, state)["w"], x, atol=2e-6)
  np.testing.assert_allclose(state.server.c["w"], c, atol=2e-6)
  np.testing.assert_allclose(
    state.clients[0]["w"][: len(SIZES)], c_i, atol=2e-6
  )


@pytest.mark.parametrize("option", ["I", "II"])
def test_while_all_variates_are_zero_it_is_fedavg(option):
  rates = sgd(ETA_L), sgd(ETA_G)
  plain = fedavg(TASK, *rates, weighting="uniform")
  ours = scaffold(TASK, *rates, option=option)
  np.testing.assert_allclose(model(ours, 1), model(plain, 1), rtol=1e-6)


def test_it_reaches_the_optimum_that_fedavg_misses():
  centers = np.array([[0.0, 0.0], [1.0, 4.0], [5.0, -1.0], [-2.0, 2.0]])
  curvatures = np.array([0.2, 1.0, 0.5, 2.0])
  optimum = curvatures @ centers / curvatures.sum()
  task = quadratic(2)

  def distance(algorithm):
    data = quadratic_data(centers, curvatures)
    batching = LocalBatching(batch_size=1, steps=5)
    simulator = make_simulator(
      task, algorithm, data, batching=batching, rounds_per_dispatch=50
    )
    w = params_of(simulator, train(simulator, 200))["w"]
    return np.linalg.norm(w - optimum)

  drifting = fedavg(task, sgd(0.3), sgd(1.0), weighting="uniform")
  assert distance(drifting) > 0.1
  assert distance(scaffold(task, sgd(0.3), sgd(1.0))) < 1e-4
  assert distance(feddyn(task, sgd(0.3), sgd(1.0), alpha=0.5)) < 1e-4


def test_at_a_rate_of_zero_variates_stay():
  simulator, before = simulate(scaffold(TASK, sgd(ETA_L), sgd(ETA_G)), 2)
  still = hparams_of(simulator, client={"learning_rate": 0.0})
  out = simulator.dispatch(before, simulator.plan(2, 1), still)
  for x, y in zip(
    jax.tree.leaves((out.state.server, out.state.clients)),
    jax.tree.leaves((before.server, before.clients)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  assert np.abs(before.server.c["w"]).max() > 0


def test_what_it_refuses():
  with pytest.raises(UnknownNameError, match=r"option='III'"):
    scaffold(TASK, sgd(0.1), sgd(1.0), option="III")
  heavy = optimizer("sgd", learning_rate=0.1, momentum=0.9)
  with pytest.raises(ValueError, match=r"client_optimizer.*momentum.*sgd"):
    scaffold(TASK, heavy, sgd(1.0))
  scaffold(TASK, heavy, sgd(1.0), option="I")
