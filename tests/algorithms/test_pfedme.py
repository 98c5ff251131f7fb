"""pFedMe against algorithm 1 of its paper, in numpy, and where it ends."""

import jax
import numpy as np
import pytest

from fedjax_sim.algorithms.pfedme import pfedme
from fedjax_sim.engine.batching import LocalBatching
from logistic import DIM, SIZES, TASK, batches, cohort, gradient, simulate
from problems import (
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

ETA, BETA, LAM, INNER, STEPS = 0.05, 0.7, 4.0, 0.1, 3


def by_hand(rounds, lam=LAM):
  """w, and all theta_i."""
  w, kept = np.zeros(DIM), np.zeros((len(SIZES), DIM))
  for r in range(rounds):
    ends = []
    for i in cohort(r):
      mine, theta = w.copy(), w.copy()
      for rows in batches(i):
        for _ in range(STEPS):
          theta = theta - INNER * (gradient(theta, rows) + lam * (theta - mine))
        mine = mine - ETA * lam * (mine - theta)
      ends.append(mine)
      kept[i] = theta
    w = (1 - BETA) * w + BETA * np.mean(ends, axis=0)
  return w, kept


def test_it_is_the_papers_recursion_whatever_lambda_becomes():
  algorithm = pfedme(
    TASK, sgd(ETA), sgd(BETA), lam=LAM, inner_rate=INNER, inner_steps=STEPS
  )
  simulator, state = simulate(algorithm, 4)
  changed = train(simulator, 4, hparams_of(simulator, lam=0.5))
  for after, lam in ((state, LAM), (changed, 0.5)):
    w, theta = by_hand(4, lam)
    found = params_of(simulator, after)["w"]
    np.testing.assert_allclose(found, w, atol=2e-6)
    own = after.clients[0].params["w"][: len(SIZES)]
    np.testing.assert_allclose(own, theta, atol=2e-6)
  assert simulator.compilations == 1
  # Clients are evaluated with theta_i, or the global model without one.
  _, first = simulate(algorithm, 1)
  message = algorithm.broadcast(first.server)
  assert algorithm.personal is not None
  for i in range(len(SIZES)):
    row = jax.tree.map(lambda x, i=i: x[i], first.clients[0])
    model = algorithm.personal(message, row).params["w"]
    expected = row.params["w"] if i in cohort(0) else message.params["w"]
    np.testing.assert_array_equal(model, expected)


def test_personal_models_end_at_the_proximal_points():
  """Of client i's quadratic around b_i, (b_i + lam w) / (1 + lam)."""
  centers = np.array([[0.0, 0.0], [1.0, 4.0], [5.0, -1.0], [-2.0, 2.0]])
  task, lam = quadratic(2), 2.0
  simulator = make_simulator(
    task,
    pfedme(task, sgd(0.2), sgd(1.0), lam=lam, inner_rate=0.3, inner_steps=9),
    quadratic_data(centers),
    batching=LocalBatching(batch_size=1, steps=3),
    rounds_per_dispatch=50,
  )
  state = train(simulator, 50)
  # A round begins at the mean and moves w_i towards b_i by a known share.
  w = centers.mean(axis=0)
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=1e-4)
  share = 0.2 * lam / (1 + lam)
  before = centers + (1 - share) ** 2 * (w - centers)
  expected = (centers + lam * before) / (1 + lam)
  own = state.clients[0].params["w"][:4]
  np.testing.assert_allclose(own, expected, atol=1e-3)


@pytest.mark.parametrize(
  "options", [{"lam": 0.0}, {"inner_rate": -1.0}, {"inner_steps": 0}]
)
def test_bad_numbers_are_named(options):
  (name,) = options
  with pytest.raises(ValueError, match=f"{name}="):
    pfedme(TASK, sgd(ETA), sgd(BETA), **options)
