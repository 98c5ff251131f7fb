"""FedBuff against algorithm 1 of its paper, in numpy."""

import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedbuff import fedbuff
from fedjax_sim.sampling import in_flight
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
from problems import params_of, sgd

ETA_L, ETA_G = 0.3, 0.7
STALENESS = np.array([0, 2, 1, 5, 1])


def by_hand(versions, rounds):
  models = [np.zeros(DIM)] * versions  # the newest first
  for r in range(rounds):
    buffer = np.zeros(DIM)
    for i in cohort(r):
      tau = min(STALENESS[i], versions - 1)
      start = models[tau]
      y = start.copy()
      for rows in batches(i):
        y = y - ETA_L * gradient(y, rows)
      buffer += (y - start) / np.sqrt(1 + tau)
    new = models[0] + ETA_G * buffer / len(cohort(r))
    models = [new, *models[:-1]]
  return models


@pytest.mark.parametrize("versions", [2, 4])
def test_it_is_the_papers_recursion(versions):
  algorithm = fedbuff(TASK, sgd(ETA_L), sgd(ETA_G), versions=versions)
  simulator, state = simulate(
    algorithm,
    6,
    versions=lambda seed, round_, ids: STALENESS[ids],
  )
  newest, *past = by_hand(versions, 6)
  found = params_of(simulator, state)["w"]
  np.testing.assert_allclose(found, newest, atol=2e-6)
  (kept, _) = state.server.past
  np.testing.assert_allclose(kept["w"], past, atol=2e-6)


def test_where_all_hold_the_newest_version_it_is_fedavg():
  plain = fedavg(TASK, sgd(ETA_L), sgd(ETA_G), weighting="uniform")
  ours = fedbuff(TASK, sgd(ETA_L), sgd(ETA_G))
  np.testing.assert_allclose(model(ours, 4), model(plain, 4), rtol=1e-5)


def test_cohorts_of_in_flight_hold_older_versions():
  algorithm = fedbuff(TASK, sgd(ETA_L), sgd(ETA_G), versions=3)
  found = [
    model(algorithm, 4, sampler=in_flight(len(SIZES), 3, 3, scale))
    for scale in (0.0, 2.0)
  ]
  assert np.abs(found[0] - found[1]).max() > 1e-3


def test_one_version_is_downloaded():
  algorithm = fedbuff(TASK, sgd(ETA_L), sgd(ETA_G), versions=4)
  simulator, _ = simulate(algorithm, 0)
  sent = simulator.traffic.down, simulator.traffic.up
  assert sent == (4 * DIM, 4 * DIM + 4)  # and a weight


@pytest.mark.parametrize("versions", [1, 2.5, "3", 2000])
def test_other_versions_are_refused(versions):
  with pytest.raises((TypeError, ValueError), match=r"versions"):
    fedbuff(TASK, sgd(0.1), sgd(1.0), versions=versions)
