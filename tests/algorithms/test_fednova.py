"""FedNova against its paper, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fednova import fednova, norm_of_proximal_a
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import (
  OPTIMIZERS,
  by_layer,
  clipped,
  optimizer,
)
from logistic import DIM, SIZES, TASK, batches, cohort, gradient, model
from problems import sgd

ETA = 0.3


def by_hand(rho, rounds, weights, server_momentum=0.0, mu=0.0):
  x, slow = np.zeros(DIM), np.zeros(DIM)
  for r in range(rounds):
    p = weights[cohort(r)] / weights[cohort(r)].sum()
    d, norms = [], []
    for i in cohort(r):
      y, velocity, gradients = x.copy(), np.zeros(DIM), []
      for rows in batches(i):
        gradients.append(gradient(y, rows))
        velocity = rho * velocity + gradients[-1] + mu * (y - x)
        y = y - ETA * velocity
      tau = len(gradients)
      # How often each gradient is in the sum of all velocities.
      a = np.array([sum(rho**j for j in range(tau - k)) for k in range(tau)])
      if mu:
        a = np.array([(1 - ETA * mu) ** (tau - 1 - k) for k in range(tau)])
      np.testing.assert_allclose(x - y, ETA * a @ np.array(gradients))
      d.append(a @ np.array(gradients) / a.sum())
      norms.append(a.sum())
    step = (p @ norms) * (p @ np.array(d))
    slow = server_momentum * slow + ETA * step
    x = x - slow
  return x


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_it_is_the_papers_recursion(rho):
  local = optimizer("sgd", learning_rate=ETA, momentum=rho)
  found = model(fednova(TASK, local, sgd(1.0)), 5)
  np.testing.assert_allclose(found, by_hand(rho, 5, SIZES), atol=5e-6)


def test_with_a_proximal_term():
  algorithm = fednova(TASK, sgd(ETA), sgd(1.0), mu=0.8)
  expected = by_hand(0.0, 5, SIZES, mu=0.8)
  np.testing.assert_allclose(model(algorithm, 5), expected, atol=5e-6)
  assert np.abs(expected - by_hand(0.0, 5, SIZES)).max() > 0.01


def test_the_norm_of_a_proximal_a():
  for tau, pull in ((1, 0.3), (7, 0.3), (7, 1e-7), (1000, 1e-6), (5, 0.0)):
    found = norm_of_proximal_a(jnp.int32(tau), pull)
    expected = np.sum((1 - np.float64(pull)) ** np.arange(tau))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_does_not_go_with_a_proximal_term():
  heavy = optimizer("sgd", learning_rate=0.1, momentum=0.5)
  with pytest.raises(ValueError, match=r"mu=0.5 does not go .* momentum"):
    fednova(TASK, heavy, sgd(1.0), mu=0.5)
  with pytest.raises(ValueError, match=r"mu=10.0 times .*learning_rate=0.1"):
    fednova(TASK, sgd(0.1), sgd(1.0), mu=10.0)
  with pytest.raises(ValueError, match=r"mu=-1"):
    fednova(TASK, sgd(0.1), sgd(1.0), mu=-1.0)


def test_a_momentum_of_one_has_no_weights():
  heavy = optimizer("sgd", learning_rate=0.1, momentum=1.0)
  with pytest.raises(ValueError, match=r"momentum=1.0 is out of range.*< 1"):
    fednova(TASK, heavy, sgd(1.0))


def test_slow_momentum_and_equal_weights():
  slow = optimizer("sgd", learning_rate=1.0, momentum=0.4)
  algorithm = fednova(TASK, sgd(ETA), slow, weighting="uniform")
  expected = by_hand(0.0, 5, np.ones(len(SIZES)), 0.4)
  np.testing.assert_allclose(model(algorithm, 5), expected, atol=5e-6)


def test_with_equal_local_steps_it_is_fedavg():
  local = optimizer("sgd", learning_rate=ETA, momentum=0.6)
  ours, plain = (make(TASK, local, sgd(0.7)) for make in (fednova, fedavg))
  equal = LocalBatching(batch_size=3, steps=4)
  np.testing.assert_allclose(
    model(ours, 4, batching=equal), model(plain, 4, batching=equal), rtol=1e-5
  )


def test_other_optimizers_are_refused():
  others = [name for name in OPTIMIZERS if name != "sgd"]
  made = [optimizer(name, learning_rate=0.1) for name in others]
  made += [optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=True)]
  shapes = jax.eval_shape(TASK.init, jax.random.key(0)).params
  made += [by_layer(sgd(0.1), ((".*", 3.0),), shapes)]
  made += [optimizer("sgd", learning_rate=lambda step: 0.1)]
  for wrong in made:
    with pytest.raises(ValueError, match=r"client_optimizer is not plain sgd"):
      fednova(TASK, wrong, sgd(1.0))
    with pytest.raises(ValueError, match=r"client_optimizer is not plain sgd"):
      scaffold(TASK, wrong, sgd(1.0))
  assert fednova(
    TASK, clipped(optimizer(optax.sgd, learning_rate=0.1), 1.0), sgd(1.0)
  )
