"""FedAvg whose clients keep their optimizers, as DiLoCo's workers do."""

import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

CENTRES = np.array([[4.0, 0.0], [-2.0, 1.0], [1.0, 3.0]])
CURVATURES = np.array([0.5, 1.0, 2.0])
STEPS, ROUNDS = 3, 5
ADAM = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8}


def diloco(keep, cohorts):
  """DiLoCo's algorithm 1 in numpy: Adam inside, Nesterov's momentum outside."""
  w, momentum = np.zeros(2), np.zeros(2)
  states = {k: (np.zeros(2), np.zeros(2), 0) for k in range(3)}
  for cohort in cohorts:
    ends = []
    for k in cohort:
      m, v, count = states[k] if keep else (np.zeros(2), np.zeros(2), 0)
      x = w.copy()
      for _ in range(STEPS):
        g = CURVATURES[k] * (x - CENTRES[k])
        m = ADAM["b1"] * m + (1 - ADAM["b1"]) * g
        v = ADAM["b2"] * v + (1 - ADAM["b2"]) * g**2
        count += 1
        m_hat = m / (1 - ADAM["b1"] ** count)
        v_hat = v / (1 - ADAM["b2"] ** count)
        x -= ADAM["learning_rate"] * m_hat / (np.sqrt(v_hat) + ADAM["eps"])
      states[k] = m, v, count
      ends.append(x)
    gradient = w - np.mean(ends, axis=0)
    momentum = 0.9 * momentum + gradient
    w = w - 0.7 * (gradient + 0.9 * momentum)
  return w


def simulator_of(keep, clients_per_round, lanes):
  task = quadratic(2)
  algorithm = fedavg(
    task,
    optimizer("adam", **ADAM),
    optimizer("sgd", learning_rate=0.7, momentum=0.9, nesterov=True),
    keep_optimizer=keep,
  )
  return make_simulator(
    task,
    algorithm,
    quadratic_data(CENTRES, CURVATURES),
    sampler=sampling.uniform(3, clients_per_round),
    batching=LocalBatching(batch_size=1, steps=STEPS),
    lanes=lanes,
  )


@pytest.mark.parametrize("clients", [3, 2])
def test_diloco_is_fedavg_with_kept_optimizers(clients):
  """Also of clients that sit out: each goes on where it stopped."""
  cohorts = [
    np.asarray(sampling.uniform(3, clients).sample(0, r)) for r in range(ROUNDS)
  ]
  simulator = simulator_of(True, clients, lanes=clients)
  found = params_of(simulator, train(simulator, ROUNDS))["w"]
  expected = diloco(True, cohorts)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.abs(expected - diloco(False, cohorts)).max() > 0.01


def test_optimizers_begin_anew_by_default():
  simulator = simulator_of(False, 3, lanes=1)
  found = params_of(simulator, train(simulator, ROUNDS))["w"]
  expected = diloco(False, [range(3)] * ROUNDS)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert simulator.algorithm.client_init(None, {}) == ()


def test_keeping_is_yes_or_no():
  with pytest.raises(TypeError, match="keep_optimizer=1"):
    fedavg(
      *(quadratic(2), sgd(0.1), sgd(1.0)),
      keep_optimizer=1,  # type: ignore[arg-type]
    )
