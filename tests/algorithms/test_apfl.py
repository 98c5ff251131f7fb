"""APFL against its recursion in numpy, and its two ends: global and local."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.apfl import Own, apfl, mix
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Variables
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from problems import (
  MODELS,
  blobs,
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

# The last two clients agree with the mean of all: there the global model
# overtakes their own ones, and their alphas fall.
CENTRES = np.array([[4.0, 0.0], [-2.0, 1.0], [1.0, 0.3], [1.0, 0.4]])
CURVATURES = np.array([0.5, 1.0, 0.6, 0.8])
CLIENTS, COPIES, RATE, SERVER_RATE = len(CENTRES), 3, 0.15, 0.6
WORK = LocalBatching(batch_size=2, epochs=2)  # 4 steps, on equal examples
STEPS = 4
COHORTS = ([0, 1, 2], [2, 3], [0, 2, 3], [1, 2])
SAMPLER = sampling.Sampler(
  sample=lambda seed, r: np.array(COHORTS[r % len(COHORTS)]),
  sizes=(3,),
  expected=2.5,
)


def simulator_of(lanes=1, devices=1, server_rate=SERVER_RATE, **options):
  data = quadratic_data(CENTRES, CURVATURES, copies=COPIES)
  task = quadratic(2)
  return make_simulator(
    task,
    apfl(task, sgd(RATE), sgd(server_rate), **options),
    dataclasses.replace(data, seen=data.train),
    batching=WORK,
    sampler=SAMPLER,
    lanes=lanes,
    devices=devices,
  )


def by_hand(rounds, alpha, alpha_rate):
  """w, (clients, 2) v and (clients,) alpha, in float64."""
  server, v = np.zeros(2), np.zeros((CLIENTS, 2))
  alphas = np.full(CLIENTS, alpha)
  for r in range(rounds):
    updates = []
    for k in COHORTS[r % len(COHORTS)]:
      w = server.copy()
      for step in range(STEPS):
        mixture = alphas[k] * v[k] + (1 - alphas[k]) * w
        gradient = CURVATURES[k] * (mixture - CENTRES[k])
        slope = (v[k] - w) @ gradient
        v[k] = v[k] - RATE * alphas[k] * gradient
        w = w - RATE * CURVATURES[k] * (w - CENTRES[k])
        if step == 0:
          alphas[k] = min(max(alphas[k] - alpha_rate * slope, 0), 1)
      updates.append(w - server)
    server = server + SERVER_RATE * np.mean(updates, axis=0)
  return server, v, alphas


def personal_of(simulator, state):
  """Every client's own model, (clients, 2)."""
  algorithm = simulator.algorithm
  message = algorithm.broadcast(state.server)
  rows = jax.tree.map(lambda x: x[:CLIENTS], state.clients[0])
  each = jax.vmap(algorithm.personal, in_axes=(None, 0))
  return np.asarray(each(message, rows).params["w"])


@pytest.mark.parametrize(
  ("alpha_rate", "lanes", "devices"),
  slow_but(
    [(0.0, 1, 1), (0.05, 2, 2)],
    [(rate, n, n) for rate in (0.0, 0.05, 2.0) for n in (1, 2)],
  ),
)
def test_the_papers_recursion(alpha_rate, lanes, devices):
  alpha, rounds = 0.4, 9
  simulator = simulator_of(lanes, devices, alpha=alpha, alpha_rate=alpha_rate)
  state = train(simulator, rounds)
  w, v, alphas = by_hand(rounds, alpha, alpha_rate)
  own = jax.device_get(state.clients[0])
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=1e-5)
  np.testing.assert_allclose(own.params["w"][:CLIENTS], v, atol=1e-5)
  np.testing.assert_allclose(own.alpha[:CLIENTS], alphas, atol=1e-5)
  mixed = alphas[:, None] * v + (1 - alphas)[:, None] * w
  np.testing.assert_allclose(personal_of(simulator, state), mixed, atol=1e-5)


def test_alpha_stays_from_0_to_1_and_reaches_both():
  simulator = simulator_of(alpha=0.4, alpha_rate=1000.0)
  state, met = simulator.init(), set()
  for out in simulator.run(state, 8):
    alphas = np.asarray(out.state.clients[0].alpha[:CLIENTS])
    assert (alphas >= 0).all()
    assert (alphas <= 1).all()
    met |= set(alphas.tolist())
  assert {0.0, 1.0} <= met


def test_alpha_0_is_the_global_model():
  simulator = simulator_of(alpha=0.0, alpha_rate=0.0)
  state = train(simulator, 8)
  w = params_of(simulator, state)["w"]
  assert np.abs(w).max() > 0.1
  np.testing.assert_array_equal(personal_of(simulator, state), [w] * CLIENTS)


@pytest.mark.parametrize("server_rate", [0.0, SERVER_RATE])
def test_alpha_1_is_local_training_that_ignores_the_server(server_rate):
  rounds = 8
  simulator = simulator_of(server_rate=server_rate, alpha=1.0, alpha_rate=0.0)
  state = train(simulator, rounds)
  taken = [
    STEPS * sum(k in COHORTS[r % len(COHORTS)] for r in range(rounds))
    for k in range(CLIENTS)
  ]
  # v - b shrinks by 1 - rate a in every step.
  left = (1 - RATE * CURVATURES) ** np.array(taken)
  expected = CENTRES * (1 - left)[:, None]
  np.testing.assert_allclose(personal_of(simulator, state), expected, atol=1e-5)


def test_a_client_that_never_took_part_uses_the_global_model():
  simulator = simulator_of(alpha=0.7)
  state = train(simulator, 1)  # without client 3
  w = params_of(simulator, state)["w"]
  own = personal_of(simulator, state)
  np.testing.assert_array_equal(own[3], w)
  assert all(np.abs(own[k] - w).max() > 1e-3 for k in COHORTS[0])


def test_clients_are_evaluated_with_their_mixtures():
  simulator = simulator_of(alpha=0.4)
  state = train(simulator, 3)
  gaps = personal_of(simulator, state) - CENTRES
  loss = 0.5 * CURVATURES * np.sum(gaps**2, axis=1)
  metrics = simulator.evaluate.clients(state, "seen")
  np.testing.assert_allclose(metrics.per_client()["loss"], loss, rtol=1e-4)


@pytest.mark.parametrize(
  ("weighting", "devices"),
  slow_but([("uniform", 2)], [("examples", 1), ("uniform", 2)]),
)
def test_the_global_model_is_that_of_fedavg(weighting, devices):
  data = blobs([5, 9, 3, 7, 6, 4])
  task = MODELS["mlp"](data)
  optimizers = (
    optimizer("sgd", learning_rate=0.1, momentum=0.5),
    optimizer("adam", learning_rate=0.05),
  )

  def simulator_of(make):
    return make_simulator(
      task,
      make(task, *optimizers, weighting=weighting),
      data,
      clients_per_round=3,
      batching=LocalBatching(batch_size=4, epochs=2),
      devices=devices,
      seed=5,
    )

  def states(simulator, hparams=None):
    first = simulator.init(hparams)
    return [o.state.server for o in simulator.run(first, 6, hparams=hparams)]

  plain, mixing = states(simulator_of(fedavg)), simulator_of(apfl)
  other = hparams_of(mixing, alpha_rate=50.0)
  for own in (states(mixing), states(mixing, other)):
    for a, b in zip(own, plain, strict=True):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b
      )


def test_buffers_are_mixed_too():
  task = quadratic(2)
  algorithm = apfl(task, sgd(0.1), sgd(1.0))
  message = Variables({"w": jnp.zeros(2)}, {"mean": jnp.ones(2)}, {"f": 3.0})
  own = Own(
    {"w": jnp.ones(2)},
    {"mean": 5 * jnp.ones(2)},
    jnp.float32(0.25),
    jnp.bool_(True),
  )
  assert algorithm.personal is not None
  mixed = algorithm.personal(message, own)
  np.testing.assert_array_equal(mixed.params["w"], [0.25, 0.25])
  np.testing.assert_array_equal(mixed.buffers["mean"], [2.0, 2.0])
  assert mixed.frozen == {"f": 3.0}


def test_the_mean_alpha_is_a_metric():
  simulator = simulator_of(alpha=0.4, alpha_rate=0.0)
  (out,) = simulator.run(simulator.init(), 1)
  assert out.rows[0]["train/alpha"] == pytest.approx(0.4)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("alpha", -0.1),
    ("alpha", 1.1),
    ("alpha", float("nan")),
    ("alpha", "half"),
    ("alpha_rate", -1.0),
    ("alpha_rate", float("inf")),
    ("alpha_rate", None),
    ("weighting", "sizes"),
  ],
)
def test_bad_arguments_are_named(field, value):
  with pytest.raises((TypeError, ValueError), match=rf"\b{field}="):
    simulator_of(**{field: value})


def test_mixtures_of_equal_counts_are_that_count():
  alphas = jnp.linspace(0, 1, 64)
  counts = jnp.full(64, 7, jnp.int32)
  np.testing.assert_array_equal(mix(alphas, counts, counts), counts)
