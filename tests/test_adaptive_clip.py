"""Adaptive clipping against its recursion, and the quantile that it finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.engine.batching import LocalBatching
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

ONE_STEP = LocalBatching(batch_size=1)


def simulator_of(centers, server_rate, **options):
  """One step of rate 1 each: an update is the center minus the parameters."""
  task = quadratic(centers.shape[1])
  algorithm = fedavg(task, sgd(1.0), sgd(server_rate), weighting="uniform")
  return make_simulator(
    task,
    algorithm,
    quadratic_data(centers),
    batching=ONE_STEP,
    lanes=3,
    transforms=[transforms.adaptive_clip(**options)],
  )


def test_it_is_the_papers_recursion():
  quantile, rate, norm = 0.6, 0.3, 1.5
  centers = np.random.default_rng(0).normal(size=(7, 3))
  simulator = simulator_of(
    centers,
    1.0,
    quantile=quantile,
    learning_rate=rate,
    initial_norm=norm,
  )
  state = simulator.init()
  w = np.zeros(3)
  for r in range(6):
    out = simulator.dispatch(state, simulator.plan(r, 1))
    state = out.state
    updates = centers - w
    norms = np.linalg.norm(updates, axis=1)
    b = norms <= norm
    w = w + np.mean(updates * np.minimum(1, norm / norms)[:, None], axis=0)
    norm = norm * np.exp(-rate * (b.mean() - quantile))
    assert out.rows[0]["adaptive_clip/below"] == pytest.approx(b.mean())
    assert float(state.shared[0]) == pytest.approx(norm, rel=1e-5)
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=1e-5)


@pytest.mark.parametrize("initial", [0.1, 50.0])
def test_the_norm_converges_to_the_quantile(initial):
  norms = np.arange(1.0, 11.0)
  # The server stays where it is, so that the norms stay what they are.
  simulator = simulator_of(
    norms[:, None],
    0.0,
    quantile=0.75,
    learning_rate=0.05,
    initial_norm=initial,
  )
  assert 7.0 <= float(train(simulator, 300).shared[0]) <= 8.1


def test_the_papers_values_are_the_defaults():
  hparams = transforms.adaptive_clip().hparams
  expected = {"quantile": 0.5, "learning_rate": 0.2, "initial_norm": 0.1}
  assert hparams == expected


def test_a_half_precision_update_keeps_its_dtype():
  transform = transforms.adaptive_clip()
  update = {"w": jnp.array([3.0, 4.0], jnp.bfloat16)}
  clipped, _, below, *_ = transform.apply(
    update, jnp.float32(1.0), (), transform.hparams, jax.random.key(0)
  )
  assert clipped["w"].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    clipped["w"].astype(jnp.float32), [0.6, 0.8], rtol=1e-2
  )
  assert below == 0


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"quantile": 1.5}, "quantile"),
    ({"learning_rate": -0.1}, "learning_rate"),
    ({"initial_norm": 0.0}, "initial_norm"),
  ],
)
def test_what_it_refuses(options, field):
  with pytest.raises(ValueError, match=rf"\b{field}="):
    transforms.adaptive_clip(**options)
