"""FLTrust against the paper's equations in numpy."""

import dataclasses

import numpy as np
import pytest

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fltrust import fltrust
from fedjax_sim.engine.batching import LocalBatching
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

CENTERS = np.array([[2.0, 1.0], [1.0, 2.0], [-3.0, -1.0], [2.0, -1.5]])
OWN = np.array([[1.5, 1.0], [1.0, 1.5], [2.0, 2.0]])
RATE, STEPS = 0.2, 3


def simulator_of(centers, own=OWN, **settings):
  task = quadratic(2)
  server = {
    "x": own.astype(np.float32),
    "a": np.ones(len(own), np.float32),
  }
  return make_simulator(
    task,
    fltrust(task, sgd(RATE), sgd(0.9), server_steps=STEPS),
    dataclasses.replace(quadratic_data(centers), server=server),
    batching=LocalBatching(batch_size=1, epochs=2),
    aggregator=aggregators.stack(),
    **settings,
  )


def trained(w, center, steps):
  """The update of gradient descent on half the squared distance."""
  after = w
  for _ in range(steps):
    after = after - RATE * (after - center)
  return after - w


def by_hand(centers, rounds):
  w = np.zeros(2)
  for _ in range(rounds):
    own = trained(w, OWN.mean(0), STEPS)
    updates = [trained(w, center, 2) for center in centers]
    norms = np.linalg.norm(updates, axis=1)
    cosine = updates @ own / (norms * np.linalg.norm(own))
    trust = np.maximum(cosine, 0)
    scaled = np.array(updates) * (np.linalg.norm(own) / norms)[:, None]
    w = w + 0.9 * trust @ scaled / trust.sum()
  return w


@pytest.mark.parametrize(
  ("lanes", "devices"), slow_but([(3, 2)], [(3, 2), (1, 1)])
)
def test_clients_count_by_how_far_they_agree(lanes, devices):
  simulator = simulator_of(CENTERS, lanes=lanes, devices=devices)
  found = params_of(simulator, train(simulator, 3))["w"]
  np.testing.assert_allclose(found, by_hand(CENTERS, 3), rtol=1e-4)


def test_large_updates_count_no_more_and_opposite_ones_nothing():
  simulator = simulator_of(np.array([[1.0, 1.0], [1e19, 1e19]]), seed=1)
  found = params_of(simulator, train(simulator, 1))["w"]
  own = 0.9 * np.linalg.norm(trained(np.zeros(2), OWN.mean(0), STEPS))
  np.testing.assert_allclose(found, own / np.sqrt(2), rtol=1e-5)
  opposed = simulator_of(np.array([[-1.0, -1.0], [-1e19, 0.0]]), seed=1)
  found = params_of(opposed, train(opposed, 1))["w"]
  np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("name", ["server_steps", "server_batch_size"])
def test_numbers_are_whole(name):
  with pytest.raises(ValueError, match=f"{name}=0 is out of range"):
    fltrust(quadratic(2), sgd(1.0), sgd(1.0), **{name: 0})
