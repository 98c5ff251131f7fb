"""MOON against its paper, in numpy with finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.moon import contrastive, moon
from logistic import DIM, SIZES, TASK, X, cohort, gradient, simulate, trained
from problems import hparams_of, params_of, sgd, train

ETA, MU, T = 0.3, 0.7, 0.5


def bend(z, maths):
  """What turns rows around; `maths` is numpy or jax.numpy."""
  return maths.tanh(z) + 0.5 * z**2


# An example's representation: bent products of its inputs and parameters.
WITH_FEATURES = TASK._replace(
  features=lambda variables, examples: bend(
    examples["x"] * variables.params["w"][None] + examples["x"], jnp
  )
)


def features(w, rows):
  x = X[rows].astype(np.float64)
  return bend(x * w + x, np)


def cosine(a, b):
  norm = lambda z: np.linalg.norm(z, axis=-1)
  return np.sum(a * b, axis=-1) / (norm(a) * norm(b))


def term(z, z_glob, z_prev):
  near, far = (np.exp(cosine(z, other) / T) for other in (z_glob, z_prev))
  return -np.log(near / (near + far))


def by_hand(mu, rounds):
  w, last = np.zeros(DIM), dict[int, np.ndarray]()
  for r in range(rounds):
    ends = {}
    for k in cohort(r):
      own = last.get(k)

      def slope(y, rows, w=w, own=own):
        if own is None:
          return gradient(y, rows)
        value = lambda y: np.mean(
          term(*(features(at, rows) for at in (y, w, own)))
        )
        step = 1e-5 * np.eye(DIM)
        ways = [(value(y + e) - value(y - e)) / 2e-5 for e in step]
        return gradient(y, rows) + mu * np.array(ways)

      ends[k] = trained(w, k, ETA, slope)
    last = {**last, **ends}
    w = SIZES[[*ends]] @ np.array([*ends.values()]) / SIZES[[*ends]].sum()
  return w


def test_it_is_the_papers_recursion_and_fedavg_at_0():
  algorithm = moon(WITH_FEATURES, sgd(ETA), sgd(1.0), mu=MU, temperature=T)
  simulator, state = simulate(algorithm, 6)
  expected, plain = by_hand(MU, 6), by_hand(0.0, 6)
  assert np.abs(expected - plain).max() > 0.01
  found = params_of(simulator, state)["w"]
  np.testing.assert_allclose(found, expected, atol=5e-6)
  without = train(simulator, 6, hparams_of(simulator, mu=0.0))
  found = params_of(simulator, without)["w"]
  np.testing.assert_allclose(found, plain, atol=5e-6)


def test_the_term_and_its_gradient(x64):
  rng = np.random.default_rng(0)
  z, z_glob, z_prev = rng.normal(size=(3, 5, 2, 3))
  rows = lambda x: x.reshape(5, 6)
  expected = term(rows(z), rows(z_glob), rows(z_prev))
  given = jnp.asarray([z, z_glob, z_prev])
  found = contrastive(given[0], given[1], given[2], T)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  total = lambda z: jnp.sum(contrastive(z, z_glob, z_prev, T))
  way = rng.normal(size=z.shape)
  step = 1e-6 * way
  slope = (total(z + step) - total(z - step)) / 2e-6
  np.testing.assert_allclose(
    jnp.vdot(jax.grad(total)(jnp.asarray(z)), way), slope, rtol=1e-6
  )
  silent = jax.grad(total)(jnp.zeros_like(z))  # as after ReLU
  assert np.isfinite(silent).all()


def test_what_it_refuses():
  with pytest.raises(ValueError, match=r"no Task.features; .* `features`"):
    moon(TASK, sgd(ETA), sgd(1.0))
  with pytest.raises(ValueError, match=r"temperature=0"):
    moon(WITH_FEATURES, sgd(ETA), sgd(1.0), temperature=0.0)
