"""FedShuffle against its paper, in numpy."""

import numpy as np
import optax
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedshuffle import fedshuffle
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from logistic import DIM, SIZES, TASK, batches, cohort, model, trained
from problems import make_simulator, params_of, quadratic, sgd, train

ETA, N = 0.9, len(SIZES)


def by_hand(rounds, unbiased):
  x = np.zeros(DIM)
  for r in range(rounds):
    ids = cohort(r)
    w = SIZES[ids] / SIZES.sum() * N / len(ids)
    if not unbiased:
      w = w / w.sum()
    ends = [trained(x, i, ETA / len(batches(i))) for i in ids]
    x = x + w @ (np.array(ends) - x)
  return x


@pytest.mark.parametrize("unbiased", [True, False])
def test_it_is_the_papers_recursion(unbiased):
  mean = float(SIZES.mean()) if unbiased else None
  found = model(fedshuffle(TASK, sgd(ETA), sgd(1.0), mean), 5)
  np.testing.assert_allclose(found, by_hand(5, unbiased), atol=2e-6)


def test_its_fixed_point_is_the_optimum_whatever_the_steps():
  """Of clients of 1 and 8 examples, one a step, FedAvg favors the latter."""
  sizes, centers, rate = np.array([1, 8]), np.array([0.0, 9.0]), 0.01
  data = FederatedDataset(
    name="unequal",
    train=FederatedData(
      examples={
        "x": np.repeat(centers, sizes)[:, None].astype(np.float32),
        "a": np.ones(9, np.float32),
      },
      offsets=np.array([0, 1, 9]),
    ),
    num_classes=0,
    example_shape=(1,),
  )
  task = quadratic(1)

  simulator = make_simulator(
    task,
    fedshuffle(task, sgd(rate), sgd(1.0), 4.5),
    data,
    batching=LocalBatching(batch_size=1),
    rounds_per_dispatch=500,
  )
  (found,) = params_of(simulator, train(simulator, 1500))["w"]

  def fixed_point(rates):
    gone = sizes * (1 - (1 - rates) ** sizes)  # on the way to the centers
    return gone @ centers / gone.sum()

  np.testing.assert_allclose(found, fixed_point(rate / sizes), rtol=1e-4)
  optimum = sizes @ centers / sizes.sum()
  assert abs(found - optimum) < 0.01
  assert abs(fixed_point(rate) - optimum) > 0.5  # FedAvg's


def test_with_equal_sizes_it_is_fedavg():
  equal = LocalBatching(batch_size=3, steps=4)
  heavy = lambda rate: optimizer("sgd", learning_rate=rate, momentum=0.5)
  ours = fedshuffle(TASK, heavy(ETA), sgd(1.0), weighting="uniform")
  plain = fedavg(TASK, heavy(ETA / 4), sgd(1.0), weighting="uniform")
  np.testing.assert_allclose(
    model(ours, 4, batching=equal), model(plain, 4, batching=equal), rtol=1e-5
  )


def test_what_it_refuses():
  with pytest.raises(ValueError, match=r"mean_examples=0"):
    fedshuffle(TASK, sgd(ETA), sgd(1.0), 0.0)
  falling = optimizer("sgd", learning_rate=optax.constant_schedule(0.1))
  with pytest.raises(ValueError, match=r"client_optimizer has no learning_rat"):
    fedshuffle(TASK, falling, sgd(1.0))
