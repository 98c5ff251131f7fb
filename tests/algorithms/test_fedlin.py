"""FedLin against algorithm 1 of its paper, in numpy, and its fixed point."""

import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlin import fedlin
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from logistic import DIM, TASK, all_rows, batches, cohort, gradient, model
from problems import (
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

ETA = 0.6


def test_it_is_the_papers_recursion():
  x = np.zeros(DIM)
  for r in range(4):
    full = {i: gradient(x, all_rows(i)) for i in cohort(r)}
    g = np.mean(list(full.values()), axis=0)
    ys = []
    for i in cohort(r):
      y = x.copy()
      for rows in batches(i):
        y = y - ETA / len(batches(i)) * (gradient(y, rows) - full[i] + g)
      ys.append(y)
    x = np.mean(ys, axis=0)
  algorithm = fedlin(TASK, sgd(ETA), sgd(1.0))
  np.testing.assert_allclose(model(algorithm, 4), x, atol=2e-6)


def test_it_reaches_the_optimum_where_fedavg_does_not():
  centres, curvatures = np.array([[1.0], [-2.0]]), np.array([4.0, 1.0])
  best = np.average(centres, axis=0, weights=curvatures)

  def end(make, rate):
    task = quadratic(1)
    simulator = make_simulator(
      task,
      make(task, sgd(rate), sgd(1.0)),
      quadratic_data(centres, curvatures),
      batching=LocalBatching(batch_size=1, epochs=6),
    )
    return flat(params_of(simulator, train(simulator, 60)))

  np.testing.assert_allclose(end(fedlin, 0.6), best, atol=1e-4)
  assert np.abs(end(fedavg, 0.1) - best) > 0.05


def test_it_takes_plain_sgd():
  momentum = optimizer("sgd", learning_rate=0.1, momentum=0.9)
  with pytest.raises(ValueError, match="is not plain sgd"):
    fedlin(TASK, momentum, sgd(1.0))
