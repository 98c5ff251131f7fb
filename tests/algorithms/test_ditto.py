"""Ditto against algorithm 1 of its paper, in numpy; personal evaluation."""

import jax
import numpy as np
import pytest

from fedjax_sim.algorithms.ditto import ditto
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.engine.batching import LocalBatching
from logistic import (
  DIM,
  SIZES,
  TASK,
  batches,
  cohort,
  gradient,
  model,
  simulate,
)
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

ETA = 0.3


def by_hand(lam, rounds):
  """w, and all v_k."""
  w, v = np.zeros(DIM), np.zeros((len(SIZES), DIM))
  for r in range(rounds):
    updates = []
    for k in cohort(r):
      local = w.copy()
      for rows in batches(k):
        local = local - ETA * gradient(local, rows)
        v[k] = v[k] - ETA * (gradient(v[k], rows) + lam * (v[k] - w))
      updates.append(local - w)
    w = w + np.average(updates, axis=0, weights=SIZES[cohort(r)])
  return w, v


@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_it_is_the_papers_recursion(lam):
  algorithm = ditto(TASK, sgd(ETA), sgd(1.0), lam=lam)
  simulator, state = simulate(algorithm, 5)
  w, v = by_hand(lam, 5)
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=2e-6)
  own = state.clients[0].params["w"][: len(SIZES)]
  np.testing.assert_allclose(own, v, atol=2e-6)


def test_the_global_model_is_that_of_fedavg():
  plain = fedavg(TASK, sgd(ETA), sgd(1.0))
  ours = ditto(TASK, sgd(ETA), sgd(1.0), lam=3.0)
  np.testing.assert_allclose(model(ours, 4), model(plain, 4), rtol=1e-5)


def test_with_lambda_zero_own_models_are_trained_locally():
  """As the only client of a federation would train its model."""
  algorithm = ditto(TASK, sgd(ETA), sgd(1.0), lam=0.0)
  _, state = simulate(algorithm, 4)
  for k in range(len(SIZES)):
    v = np.zeros(DIM)
    for _ in range(sum(k in cohort(r) for r in range(4))):
      for rows in batches(k):
        v = v - ETA * gradient(v, rows)
    np.testing.assert_allclose(state.clients[0].params["w"][k], v, atol=2e-6)


def test_with_a_large_lambda_own_models_are_the_global_ones_that_came():
  """Whose steps then are small: rate lambda stays below 1."""
  lam = 1e4
  algorithm = ditto(TASK, sgd(1 / lam), sgd(1.0), lam=lam)
  plain = fedavg(TASK, sgd(1 / lam), sgd(1.0))
  simulator, state = simulate(algorithm, 3)
  w = model(plain, 2)  # what the cohort of the third round received
  own = np.asarray(state.clients[0].params["w"])[cohort(2)]
  np.testing.assert_allclose(own, np.stack([w] * 3), atol=2e-4)
  assert simulator.algorithm.personal is not None
  np.testing.assert_allclose(
    params_of(simulator, state)["w"], model(plain, 3), rtol=1e-5
  )


def test_own_models_end_between_the_own_optimum_and_the_global_one():
  centers = np.array([[0.0, 0.0], [1.0, 4.0], [5.0, -1.0], [-2.0, 2.0]])
  task, lam = quadratic(2), 0.5
  algorithm = ditto(task, sgd(0.2), sgd(1.0), lam=lam)
  batching = LocalBatching(batch_size=1, steps=5)
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(centers),
    batching=batching,
    lanes=2,
    rounds_per_dispatch=50,
  )
  state = train(simulator, 200)
  mean = centers.mean(axis=0)
  np.testing.assert_allclose(params_of(simulator, state)["w"], mean, atol=1e-4)
  between = (centers + lam * mean) / (1 + lam)
  own = state.clients[0].params["w"][:4]
  np.testing.assert_allclose(own, between, atol=1e-4)


def test_clients_are_evaluated_with_their_own_models():
  """And with the global one before they first take part."""
  algorithm = ditto(TASK, sgd(ETA), sgd(1.0))
  simulator, state = simulate(algorithm, 1)
  assert algorithm.personal is not None
  message = algorithm.broadcast(state.server)
  w = params_of(simulator, state)["w"]
  for k in range(len(SIZES)):
    row = jax.tree.map(lambda x, k=k: x[k], state.clients[0])
    found = algorithm.personal(message, row).params["w"]
    if k in cohort(0):
      np.testing.assert_array_equal(found, row.params["w"])
      assert np.abs(found - w).max() > 1e-3
    else:
      np.testing.assert_array_equal(found, w)


def test_a_strength_below_zero_is_refused():
  with pytest.raises(ValueError, match=r"lam"):
    ditto(TASK, sgd(ETA), sgd(1.0), lam=-0.1)
