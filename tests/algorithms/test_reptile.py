"""Reptile on quadratics, where k local steps have a closed form."""

import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.reptile import reptile
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from problems import make_simulator, params_of, quadratic, sgd, train
from tiers import slow_but

CENTRES = np.array([[4.0, 0.0], [-2.0, 1.0], [1.0, 3.0]])
CURVATURES = np.array([0.5, 1.0, 2.0])
SIZES = np.array([1, 6, 2])
RATE, K = 0.2, 3


def simulator_of(make, epsilon, devices=1):
  task = quadratic(2)
  train_data = FederatedData(
    examples={
      "x": np.repeat(CENTRES.astype(np.float32), SIZES, axis=0),
      "a": np.repeat(CURVATURES.astype(np.float32), SIZES),
    },
    offsets=np.append(0, np.cumsum(SIZES)),
  )
  return make_simulator(
    task,
    make(task, sgd(RATE), epsilon),
    FederatedDataset(
      name="quadratic", train=train_data, num_classes=0, example_shape=(2,)
    ),
    batching=LocalBatching(batch_size=2, steps=K),
    lanes=devices,
    devices=devices,
  )


def by_hand(rounds, step, weights):
  """`step`: (w, mean of w_i - w) -> w."""
  w = np.zeros(2)
  for _ in range(rounds):
    moved = 1 - (1 - RATE * CURVATURES) ** K
    updates = moved[:, None] * (CENTRES - w)
    w = step(w, np.average(updates, axis=0, weights=weights))
  return w


@pytest.mark.parametrize(
  ("epsilon", "devices"),
  slow_but([(0.25, 2)], [(e, n) for e in (0.25, 1.0) for n in (1, 2)]),
)
def test_the_server_goes_some_of_the_way_to_the_mean(epsilon, devices):
  simulator = simulator_of(reptile, sgd(epsilon), devices)
  w = params_of(simulator, train(simulator, 5))["w"]
  step = lambda w, mean: w + epsilon * mean
  np.testing.assert_allclose(w, by_hand(5, step, np.ones(3)), atol=1e-5)
  by_size = by_hand(5, step, SIZES)
  assert np.abs(w - by_size).max() > 0.1
  plain = simulator_of(fedavg, sgd(epsilon), devices)
  w = params_of(plain, train(plain, 5))["w"]
  np.testing.assert_allclose(w, by_size, atol=1e-5)


def test_the_mean_is_a_gradient_for_the_servers_optimizer():
  simulator = simulator_of(
    reptile, optimizer("sgd", learning_rate=0.5, momentum=0.5)
  )
  w = params_of(simulator, train(simulator, 5))["w"]
  trace = np.zeros(2)

  def step(w, mean):
    trace[:] = 0.5 * trace + mean
    return w + 0.5 * trace

  np.testing.assert_allclose(w, by_hand(5, step, np.ones(3)), atol=1e-5)


def test_it_takes_no_weighting():
  config = default_config()
  config.algorithm.name = "reptile"
  build(config)
  config.algorithm.weighting = "examples"
  with pytest.raises(ValueError, match=r"not take 'algorithm\.weighting'"):
    build(config)
