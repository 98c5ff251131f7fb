"""Agnostic federated learning against its paper, in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from fedjax_sim.algorithms.agnostic import agnostic, projected
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.local import with_local_dp
from fedjax_sim.privacy.local.additive import clip_only
from logistic import DIM, SIZES, TASK, all_rows, cohort, loss, simulate, trained
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

ETA, RATE, N = 0.3, 0.5, len(SIZES)


def nearest(v):
  """The point of the simplex that is nearest to v, by bisection."""
  v = np.asarray(v, np.float64)
  excess = lambda theta: np.maximum(v - theta, 0).sum() - 1
  theta = scipy.optimize.brentq(excess, v.min() - 1, v.max(), xtol=1e-14)
  return np.maximum(v - theta, 0)


def by_hand(rounds):
  w, lam = np.zeros(DIM), np.full(N, 1 / N)
  for r in range(rounds):
    share, slope = N / len(cohort(r)), np.zeros(N)
    step = np.zeros(DIM)
    for k in cohort(r):
      step += share * lam[k] * (trained(w, k, ETA) - w)
      slope[k] = share * loss(w, all_rows(k))
    w, lam = w + step, nearest(lam + RATE * slope)
  return w, lam


def test_it_is_descent_and_ascent():
  algorithm = agnostic(TASK, sgd(ETA), sgd(1.0), N, lambda_rate=RATE)
  simulator, state = simulate(algorithm, 5)
  w, lam = by_hand(5)
  assert (lam == 0).any()  # so that a client of a cohort counts nothing
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=5e-6)
  np.testing.assert_allclose(state.server.lam, lam, atol=5e-6)
  # A client gets the model and its lambda_k; it sends weight and loss, too.
  sent = simulator.traffic
  assert (sent.down, sent.up) == (4 * DIM + 4, 4 * DIM + 4 + 4)


def test_it_reaches_the_minimax_point():
  """x^2 / 2 and 2 (x - 1)^2 are equal at 2 / 3, with slopes 2 / 3, -4 / 3."""
  task = quadratic(1)
  simulator = make_simulator(
    task,
    agnostic(task, sgd(0.05), sgd(1.0), 2, lambda_rate=0.1),
    quadratic_data([[0.0], [1.0]], [1.0, 4.0]),
    batching=LocalBatching(batch_size=1, steps=1),
    rounds_per_dispatch=300,
  )
  state = train(simulator, 1500)
  np.testing.assert_allclose(params_of(simulator, state)["w"], 2 / 3, atol=1e-3)
  np.testing.assert_allclose(state.server.lam, [2 / 3, 1 / 3], atol=1e-3)


def test_the_projection_is_the_nearest_point():
  rng = np.random.default_rng(0)
  for scale in (0.01, 0.3, 10.0):
    v = scale * rng.normal(size=9).astype(np.float32)
    found = projected(jnp.asarray(v))
    np.testing.assert_allclose(found, nearest(v), atol=1e-6)


def test_what_it_refuses():
  wrong = agnostic(TASK, sgd(ETA), sgd(1.0), 4)
  with pytest.raises(ValueError, match=r"num_clients=4, .* 5 clients"):
    simulate(wrong, 1)
  private = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=1.0, denominator=3.0
  )
  with pytest.raises(ValueError, match=r"every client by itself"):
    with_central_dp(wrong, private)
  with pytest.raises(ValueError, match=r"other numbers of every client"):
    with_local_dp(wrong, clip_only(1.0))
