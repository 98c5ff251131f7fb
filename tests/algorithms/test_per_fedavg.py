"""First-order Per-FedAvg against numpy: its recursion and where it ends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.per_fedavg import halves, per_fedavg
from fedjax_sim.core import Batch
from fedjax_sim.data import FederatedData, FederatedDataset
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

SIZES = np.array([7, 4, 1, 5])  # batches of 3: last ones of 1, 1, 1 and 2
OFFSETS = np.append(0, np.cumsum(SIZES))
BATCH, EPOCHS, RATE, INNER, SERVER_RATE = 3, 2, 0.2, 0.35, 0.7
RNG = np.random.default_rng(0)
X = RNG.normal(size=(SIZES.sum(), 2))
A = RNG.uniform(0.3, 1.5, size=SIZES.sum())
COHORTS = ([0, 2], [1, 2], [0, 1, 2])  # never client 3
SAMPLER = sampling.Sampler(
  sample=lambda seed, r: np.array(COHORTS[r % len(COHORTS)]),
  sizes=(3,),
  expected=2.5,
)


def simulator_of(lanes=1, devices=1, inner_rate=INNER, batch_size=BATCH):
  data = FederatedData(
    examples={"x": X.astype(np.float32), "a": A.astype(np.float32)},
    offsets=OFFSETS,
  )
  task = quadratic(2)
  return make_simulator(
    task,
    per_fedavg(task, sgd(RATE), sgd(SERVER_RATE), inner_rate=inner_rate),
    FederatedDataset(
      name="quadratic",
      train=data,
      num_classes=0,
      example_shape=(2,),
      seen=data,
    ),
    batching=LocalBatching(batch_size=batch_size, epochs=EPOCHS, shuffle=False),
    sampler=SAMPLER,
    lanes=lanes,
    devices=devices,
  )


def gradient(w, rows):
  return np.mean(A[rows, None] * (w - X[rows]), axis=0)


def loss(w, rows):
  """Of every row."""
  return 0.5 * A[rows] * np.sum((w - X[rows]) ** 2, axis=1)


def by_hand(rounds):
  """Per round: the model, clients' adapted ones, the mean loss of D'."""
  server, adapted = np.zeros(2), {}
  for r in range(rounds):
    updates, weights, losses = [], [], []
    for k in COHORTS[r % len(COHORTS)]:
      w, first = server, None
      for _ in range(EPOCHS):
        for begin in range(OFFSETS[k], OFFSETS[k + 1], BATCH):
          rows = np.arange(begin, min(begin + BATCH, OFFSETS[k + 1]))
          one, other = (rows[::2], rows[1::2]) if len(rows) > 1 else [rows] * 2
          u = w - INNER * gradient(w, one)
          first = u if first is None else first
          losses.extend(loss(u, other))
          w = w - RATE * gradient(u, other)
      adapted[k] = first
      updates.append(w - server)
      weights.append(SIZES[k])
    mean = np.average(updates, axis=0, weights=weights)
    server = server + SERVER_RATE * mean
    yield server, dict(adapted), np.mean(losses)


@pytest.mark.parametrize(
  ("lanes", "devices"), slow_but([(2, 2)], [(1, 1), (3, 1), (2, 2)])
)
def test_the_papers_recursion(lanes, devices):
  simulator = simulator_of(lanes, devices)
  outs = simulator.run(simulator.init(), 6)
  for out, (w, adapted, mean) in zip(outs, by_hand(6), strict=True):
    got = params_of(simulator, out.state)["w"]
    np.testing.assert_allclose(got, w, atol=1e-5)
    kept = jax.device_get(out.state.clients[0])
    for k, u in adapted.items():
      np.testing.assert_allclose(kept.params["w"][k], u, atol=1e-5)
    assert kept.trained[:4].tolist() == [k in adapted for k in range(4)]
    assert out.rows[0]["train/loss"] == pytest.approx(mean, rel=1e-4)


def test_clients_are_evaluated_with_their_adapted_models():
  simulator = simulator_of()
  state = train(simulator, 2)
  *_, (w, adapted, _) = by_hand(2)
  models = [adapted.get(k, w) for k in range(4)]  # client 3 has none
  rows = [np.arange(*OFFSETS[k : k + 2]) for k in range(4)]
  expected = [loss(m, r).mean() for m, r in zip(models, rows, strict=True)]
  metrics = simulator.evaluate.clients(state, "seen").per_client()
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_it_ends_where_first_order_adaptation_does():
  """Neither at FedAvg's optimum, nor at that of exact meta-learning."""
  centres = np.array([[4.0, 0.0], [-2.0, 1.0], [1.0, 3.0]])
  a, inner = np.array([0.5, 1.0, 2.0]), 0.3
  task = quadratic(2)
  simulator = make_simulator(
    task,
    per_fedavg(task, sgd(0.3), sgd(1.0), inner_rate=inner),
    quadratic_data(centres, a, copies=2),
    batching=LocalBatching(batch_size=2),
  )
  w = params_of(simulator, train(simulator, 100))["w"]
  # The mean over clients of a (u - b) is 0, with u - b = (1 - inner a)(w - b).
  ends = [
    np.average(centres, axis=0, weights=a * (1 - inner * a) ** power)
    for power in (0, 1, 2)
  ]
  np.testing.assert_allclose(w, ends[1], atol=1e-5)
  assert all(np.abs(w - ends[power]).max() > 0.1 for power in (0, 2))


def test_without_adaptation_single_examples_are_fedavgs():
  simulator = simulator_of(inner_rate=0.0, batch_size=1)
  plain = make_simulator(
    simulator.task,
    fedavg(simulator.task, sgd(RATE), sgd(SERVER_RATE)),
    simulator.data,
    batching=LocalBatching(batch_size=1, epochs=EPOCHS, shuffle=False),
    sampler=SAMPLER,
  )
  a, b = (params_of(s, train(s, 5))["w"] for s in (simulator, plain))
  np.testing.assert_allclose(a, b, atol=1e-6)


def test_halves_of_every_mask():
  for size in range(1, 6):
    for mask in itertools.product([False, True], repeat=size):
      real = np.flatnonzero(mask)
      one, other = (real[::2], real[1::2]) if len(real) > 1 else (real, real)
      examples = {"x": jnp.arange(size)}
      first, second = halves(Batch(examples, jnp.asarray(mask)))
      np.testing.assert_array_equal(np.flatnonzero(first.mask), one)
      np.testing.assert_array_equal(np.flatnonzero(second.mask), other)
      assert first.mask.dtype == second.mask.dtype == bool
      assert first.examples is second.examples is examples


def test_buffers_are_the_global_ones():
  simulator = simulator_of()
  state = train(simulator, 1)
  message = simulator.algorithm.broadcast(state.server)
  message = message._replace(buffers={"mean": 2.0}, frozen={"f": 3.0})
  row = jax.tree.map(lambda x: x[0], state.clients[0])
  assert simulator.algorithm.personal is not None
  own = simulator.algorithm.personal(message, row)
  assert (own.buffers, own.frozen) == ({"mean": 2.0}, {"f": 3.0})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1"])
def test_bad_rates_are_named(value):
  with pytest.raises((TypeError, ValueError), match=r"inner_rate="):
    simulator_of(inner_rate=value)
