"""DGA, its agent and FedLAW against numpy and known answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim import aggregators
from fedjax_sim.algorithms.dga import STATISTICS, dga
from fedjax_sim.algorithms.dga_rl import (
  FEATURES,
  SEEN,
  Memory,
  dga_rl,
  features,
  regression,
)
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlaw import fedlaw
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.core import Members
from fedjax_sim.data import with_random_labels, with_server_data
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_log import combine, gradient_statistics
from fedjax_sim.models.logistic_regression import logistic_regression
from problems import (
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

CENTRES = np.array([[1.0, 2.0], [-1.0, 0.5], [3.0, -2.0], [0.0, 4.0]])
CURVATURES = np.array([1.0, 0.5, 0.25, 0.8])
RATE, STEPS = 0.5, 3


def local_round(w):
  """Updates and statistics of all clients, float64."""
  updates, losses = [], []
  for centre, a in zip(CENTRES, CURVATURES, strict=True):
    local, loss = w.copy(), 0.0
    for _ in range(STEPS):
      loss += 0.5 * a * np.sum((local - centre) ** 2) / STEPS
      local = local - RATE * a * (local - centre)
    updates.append(local - w)
    losses.append(loss)
  gradient = -np.array(updates)
  statistics = {
    "loss": np.array(losses),
    "variance": gradient.var(axis=1),
    "mean": gradient.mean(axis=1),
    "magnitude": np.sqrt((gradient**2).mean(axis=1)),
  }
  return np.array(updates), statistics


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def quadratic_run(make, rounds, **settings):
  task = quadratic(2)
  data = quadratic_data(CENTRES, CURVATURES)
  if "server" in settings:
    data = dataclasses.replace(data, server=settings.pop("server"))
  simulator = make_simulator(
    task,
    make(task, sgd(RATE), sgd(1.0)),
    data,
    batching=LocalBatching(batch_size=1, epochs=STEPS),
    **settings,
  )
  return simulator, train(simulator, rounds)


@pytest.mark.parametrize(
  ("statistic", "devices"), [*((name, 2) for name in STATISTICS), ("loss", 1)]
)
def test_weights_are_the_softmax_of_the_statistic(statistic, devices):
  make = lambda *args: dga(*args, statistic=statistic, beta=1.0)
  simulator, _ = quadratic_run(make, 0, lanes=devices, devices=devices)
  for beta in (0.0, 1.5, -2.0, 8.0):  # traced: compiled once
    state = train(simulator, 3, hparams_of(simulator, beta=beta))
    w = np.zeros(2)
    for _ in range(3):
      updates, statistics = local_round(w)
      w = w + softmax(-beta * statistics[statistic]) @ updates
    np.testing.assert_allclose(
      params_of(simulator, state)["w"], w, rtol=2e-4, atol=1e-5
    )
  assert simulator.compilations == 1


def test_a_fixed_zero_changes_no_mean_and_sends_no_statistic():
  make = lambda *args: dga(*args, beta=1.5, reference=4.0)
  simulator, state = quadratic_run(make, 3, lanes=2)
  w = np.zeros(2)
  for _ in range(3):
    updates, statistics = local_round(w)
    w = w + softmax(-1.5 * statistics["loss"]) @ updates
  np.testing.assert_allclose(
    params_of(simulator, state)["w"], w, rtol=2e-4, atol=1e-5
  )
  assert jax.tree.leaves(state.server.reference) == []
  task = quadratic(2)
  with pytest.raises(ValueError, match=r"reference=1\.0 does not go with"):
    dga(task, sgd(1.0), sgd(1.0), weighting="uniform", reference=1.0)


def test_far_apart_statistics_give_finite_weights():
  make = lambda *args: dga(*args, beta=1e4)
  simulator, state = quadratic_run(make, 6)
  assert np.isfinite(params_of(simulator, state)["w"]).all()


def test_uniform_weights_are_those_of_fedavg():
  one = quadratic_run(lambda *args: dga(*args, weighting="uniform"), 3)
  other = quadratic_run(lambda *args: fedavg(*args, weighting="uniform"), 3)
  np.testing.assert_array_equal(params_of(*one)["w"], params_of(*other)["w"])


@given(
  hnp.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)),
  hnp.arrays(np.float32, (5,), elements=st.floats(-100, 100, width=32)),
)
def test_statistics_are_those_of_the_negative_update(a, b):
  found = gradient_statistics({"a": jnp.asarray(a), "b": jnp.asarray(b)})
  g = -np.concatenate([a.ravel(), b]).astype(np.float64)
  expected = {
    "norm": np.linalg.norm(g),
    "mean": g.mean(),
    "magnitude": np.sqrt((g**2).mean()),
    "variance": g.var(),
  }
  assert set(found) == set(expected)
  for name, value in expected.items():
    scale = max(1.0, float(np.abs(g).max()) ** (2 if name == "variance" else 1))
    np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * scale)


def test_a_weighted_mean_of_nobody_is_nothing():
  stack = {"w": jnp.ones((3, 2))}
  np.testing.assert_array_equal(combine(stack, jnp.zeros(3))["w"], [0, 0])
  mean = combine({"w": jnp.asarray([[1.0], [4.0]])}, jnp.asarray([3.0, 1.0]))
  np.testing.assert_allclose(mean["w"], [7 / 4])


# --- weights learned on the server's examples ---------------------------------


def target(x):
  return {"x": np.array([x], np.float32), "a": np.ones(1, np.float32)}


def test_the_learned_weights_find_the_best_mixture():
  """Two clients reach both ends of a line; the server wants a point on it."""
  updates, _ = local_round(np.zeros(2))
  wanted = 0.3 * updates[0] + 0.7 * updates[3]
  make = lambda *args: fedlaw(
    *args, weight_steps=3000, weight_rate=0.05, kl_weight=0.0
  )
  simulator, state = quadratic_run(
    make, 1, server=target(wanted), aggregator=aggregators.stack()
  )
  found = params_of(simulator, state)["w"]
  np.testing.assert_allclose(found, wanted, atol=0.02)
  plain = updates.mean(axis=0)
  assert np.linalg.norm(plain - wanted) > 0.2


def test_no_steps_on_the_weights_are_fedavg():
  make = lambda *args: fedlaw(*args, weight_rate=0.0)
  one = quadratic_run(
    make, 3, server=target([9.0, 9.0]), aggregator=aggregators.stack()
  )
  other = quadratic_run(fedavg, 3)
  np.testing.assert_allclose(
    params_of(*one)["w"], params_of(*other)["w"], rtol=1e-5
  )


def test_a_strong_pull_keeps_the_first_weights():
  """The server's example is far away, and would take one client alone."""
  free, held = (
    params_of(
      *quadratic_run(
        lambda *args, pull=pull: fedlaw(*args, kl_weight=pull),
        1,
        server=target([0.0, 40.0]),
        aggregator=aggregators.stack(),
      )
    )["w"]
    for pull in (0.0, 1e4)
  )
  plain = params_of(*quadratic_run(fedavg, 1))["w"]
  assert np.abs(free - plain).max() > 1.0
  assert np.abs(held - plain).max() < 0.3


@functools.cache
def classes(make, corrupted, rounds=15, devices=1, **options):
  """Accuracy on clean labels after training with corrupted clients."""
  data = with_server_data(blobs(np.full(13, 30), seed=1), 3)
  clean = data.train.examples
  data, _ = with_random_labels(data, corrupted)
  task = logistic_regression(data.example_shape, data.num_classes)
  algorithm = make(task, sgd(0.5), sgd(1.0), **options)
  simulator = make_simulator(
    task,
    algorithm,
    data,
    batching=LocalBatching(batch_size=10, epochs=5),
    lanes=devices,
    devices=devices,
    aggregator=aggregators.stack()
    if algorithm.requirements.all_updates
    else None,
  )
  state = train(simulator, rounds)
  assert simulator.compilations == 1
  metrics = task.metrics(
    algorithm.variables(jax.device_get(state.server)),
    {k: jnp.asarray(v) for k, v in clean.items()},
  )
  hits = metrics["accuracy"]
  return float(hits.total.sum() / hits.weight.sum()), state


@pytest.mark.parametrize("make", slow_but([dga_rl], [fedlaw, dga_rl]))
def test_they_find_out_who_is_corrupted(make):
  """Most clients are: a mean of all learns little."""
  usual, _ = classes(fedavg, 0.8)
  found, _ = classes(make, 0.8)
  clean, _ = classes(fedavg, 0.0)
  assert clean > 0.85
  assert found > usual + 0.5 * (clean - usual)


@pytest.mark.parametrize("make", slow_but([dga_rl], [fedlaw, dga_rl]))
def test_two_devices_do_what_one_does(make):
  one, two = (classes(make, 0.4, rounds=4, devices=d)[1].server for d in (1, 2))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    jax.device_get(one),
    jax.device_get(two),
  )


# --- the agent ----------------------------------------------------------------


def test_the_policy_is_a_ridge_regression_of_the_rewards():
  rng = np.random.default_rng(0)
  actions = rng.normal(size=(12, FEATURES))
  rewards = actions @ rng.normal(size=FEATURES) + 0.1 * rng.normal(size=12)
  memory = Memory(
    jnp.asarray(np.pad(actions, ((0, 5), (0, 0))), jnp.float32),
    jnp.asarray(np.pad(rewards, (0, 5)), jnp.float32),
    jnp.int32(12),
  )
  stacked = np.concatenate([actions, np.sqrt(0.5) * np.eye(FEATURES)])
  expected = np.linalg.lstsq(
    stacked, np.append(rewards, np.zeros(FEATURES)), rcond=None
  )[0]
  found = regression(memory, jnp.float32(0.5))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_features_are_standardised_over_those_present():
  values = np.random.default_rng(1).normal(size=(len(SEEN), 5)) * 10
  present = np.array([True, True, False, True, True])
  members = Members(
    id=jnp.arange(5),
    present=jnp.asarray(present),
    weight=jnp.ones(5),
    values={n: jnp.asarray(v) for n, v in zip(SEEN, values, strict=True)},
  )
  found = np.asarray(features(members))
  seen = values.T[present]
  z = (seen - seen.mean(0)) / seen.std(0)
  expected = np.concatenate([np.ones((4, 1)), z, z**2], axis=1)
  np.testing.assert_allclose(found[present], expected, rtol=1e-4, atol=1e-5)
  assert not found[~present].any()


def test_the_agents_reward_is_what_the_server_gains():
  """All of its actions are random, and some rounds get better by them."""
  _, state = classes(dga_rl, 0.6, rounds=20, epsilon=1.0, epsilon_decay=1.0)
  memory = jax.device_get(state.server.memory)
  assert memory.rounds == 20
  rewards = memory.reward[:20]
  assert not memory.reward[20:].any()
  assert (np.abs(rewards) <= 1).all()
  assert (rewards > 0).any()
  assert (rewards < 0).any()


def test_the_reward_has_the_metrics_direction():
  """Metrics +loss and -loss, named alike, are the same to the agent."""

  def run(sign, higher):
    task = quadratic(2)
    plain = task.metrics

    def metrics(variables, examples):
      loss = plain(variables, examples)["loss"]
      return {"x": loss._replace(total=sign * loss.total)}

    task = task._replace(metrics=metrics, higher_is_better={"x": higher})
    agent = lambda _, *args: dga_rl(task, *args, metric="x", epsilon=1.0)
    _, state = quadratic_run(
      agent, 6, server=target([3.0, -2.0]), aggregator=aggregators.stack()
    )
    return jax.device_get(state.server.memory.reward)[:6]

  one, other = run(1.0, False), run(-1.0, True)
  assert np.abs(one).max() > 0
  np.testing.assert_array_equal(one, other)


def test_a_reward_that_is_no_number_is_forgotten():
  task = quadratic(2)
  plain = task.metrics

  def metrics(variables, examples):
    loss = plain(variables, examples)["loss"]
    return {"loss": loss._replace(total=loss.total / 0.0 * 0.0)}

  broken = task._replace(metrics=metrics)
  agent = lambda _, *args: dga_rl(broken, *args, metric="loss", epsilon=1.0)
  _, state = quadratic_run(
    agent, 3, server=target([3.0, -2.0]), aggregator=aggregators.stack()
  )
  server = jax.device_get(state.server)
  assert server.memory.rounds == 3
  assert np.isfinite(server.theta).all()
  assert not server.memory.reward.any()


# --- refused ------------------------------------------------------------------


@pytest.mark.parametrize("make", [fedlaw, dga_rl])
def test_they_need_a_stack_and_the_servers_examples(make):
  with pytest.raises(ValueError, match=r"set aggregator\.name='stack'"):
    quadratic_run(make, 1, server=target([0.0, 0.0]))
  with pytest.raises(ValueError, match=r"data\.server_clients"):
    quadratic_run(make, 1, aggregator=aggregators.stack())
  with pytest.raises(ValueError, match="leaves the joining of updates"):
    quadratic_run(fedavg, 1, aggregator=aggregators.stack())


@pytest.mark.parametrize(
  ("make", "options", "field"),
  [
    (dga, {"statistic": "losses"}, r"statistic"),
    (dga, {"statistic_of": "batch"}, r"statistic_of='batch' .*batches, update"),
    (fedprox, {"cumulative": 1}, r"cumulative=1 .*True or False"),
    (dga, {"weighting": "examples"}, r"weighting"),
    (dga, {"beta": float("nan")}, r"beta"),
    (dga, {"beta": 1.0, "weighting": "uniform"}, r"beta=1\.0"),
    (dga_rl, {"metric": "size"}, r"metric='size'.*higher_is_bet"),
    (dga_rl, {"epsilon": 1.5}, r"epsilon"),
    (dga_rl, {"ridge": 0.0}, r"ridge"),
    (dga_rl, {"memory_rounds": 0}, r"memory_rounds"),
    (fedlaw, {"weight_steps": 0}, r"weight_steps"),
    (fedlaw, {"weight_rate": -1.0}, r"weight_rate"),
    (fedlaw, {"kl_weight": -1.0}, r"kl_weight"),
  ],
)
def test_options_out_of_range(make, options, field):
  with pytest.raises((TypeError, ValueError), match=field):
    make(quadratic(2), sgd(0.1), sgd(1.0), **options)


def test_a_metric_that_the_task_lacks():
  make = lambda *args: dga_rl(*args, metric="accuracy")
  with pytest.raises(ValueError, match=r"metric"):
    quadratic_run(
      make, 1, server=target([0.0, 0.0]), aggregator=aggregators.stack()
    )
