"""Fine-tuning of every client before it is evaluated, against numpy."""

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_sim import aggregators
from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.ditto import ditto
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.gossip import gossip
from fedjax_sim.algorithms.hierarchical import hierarchical
from fedjax_sim.data import FederatedData
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.simulation import finetuning
from fedjax_sim.simulation.finetuning import Finetuning
from problems import (
  counting_steps,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
)
from problems import train as train_rounds

RATE, STEPS = 0.3, 2
CENTERS = np.array([[0.0, 0.0], [1.0, 4.0], [5.0, -1.0], [-2.0, 2.0], [3, 3]])
# Client 3 has nothing to be evaluated on, client 1 two examples.
HELD_OUT = np.array([0, 1, 1, 2, 4])
TARGETS = CENTERS[HELD_OUT] + 0.5
OFFSETS = np.array([0, 1, 3, 4, 4, 5])


def simulator_of(make, change=lambda task: task, **options):
  data = quadratic_data(CENTERS)
  seen = FederatedData(
    examples={
      "x": TARGETS.astype(np.float32),
      "a": np.ones(len(TARGETS), np.float32),
    },
    offsets=OFFSETS,
    allow_empty=True,
  )
  data = dataclasses.replace(data, seen=seen)
  task = change(quadratic(2))
  return make_simulator(
    task,
    make(task),
    data,
    clients_per_round=2,
    batching=LocalBatching(batch_size=1, steps=1),
    **options,
  )


def tuning_of(simulator):
  return Finetuning(
    simulator=simulator,
    optimizer=sgd(RATE),
    batching=LocalBatching(batch_size=1, steps=STEPS),
  )


def expected(models):
  """Each client's sum of losses, after gradient descent to its own center."""
  near = CENTERS + (1 - RATE) ** STEPS * (models - CENTERS)
  owner = np.repeat(np.arange(5), np.diff(OFFSETS))
  losses = 0.5 * np.sum((near[owner] - TARGETS) ** 2, axis=1)
  return np.bincount(owner, losses, minlength=5)


@pytest.mark.parametrize("name", ["gossip", "hierarchical"])
def test_clients_tune_the_model_that_they_receive(name):
  """Of several models on the server, its own or its edge's."""
  make, stack = {
    "gossip": (lambda task: gossip(task, sgd(0.2), 5), aggregators.stack()),
    "hierarchical": (
      lambda task: hierarchical(task, sgd(0.2), 5, edges=2, cloud_every=9),
      None,
    ),
  }[name]
  simulator = simulator_of(make, aggregator=stack)
  state = train_rounds(simulator, 3)
  algorithm = simulator.algorithm
  message = algorithm.broadcast(state.server)
  models = [
    algorithm.download(message, 0, client).params["w"] for client in range(5)
  ]
  assert len(np.unique(np.array(models), axis=0)) > 1
  found = tuning_of(simulator)(state)
  np.testing.assert_allclose(
    found.total["loss"], expected(np.array(models)), rtol=1e-5
  )


def test_clients_tune_the_global_model(monkeypatch):
  """In several rounds, the last of which measures clients again."""
  monkeypatch.setattr(finetuning, "_MOST", 3)
  simulator = simulator_of(
    lambda task: fedavg(task, sgd(0.2), sgd(1.0)), lanes=2, devices=2
  )
  state = train_rounds(simulator, 3)
  before = jax.device_get(state)
  tuned = tuning_of(simulator)
  found = tuned(state)
  w = params_of(simulator, state)["w"]
  np.testing.assert_allclose(found.total["loss"], expected(w), rtol=1e-5)
  np.testing.assert_array_equal(found.weight["loss"], np.diff(OFFSETS))
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
  # Again, of another model, without compiling anything.
  moved = jax.tree.map(lambda x: x, state)
  moved = moved._replace(
    server=simulator.algorithm.with_model(
      state.server,
      jax.tree.map(
        lambda x: x + 1, simulator.algorithm.variables(state.server)
      ),
    )
  )
  again = tuned(moved)
  np.testing.assert_allclose(again.total["loss"], expected(w + 1), rtol=1e-5)
  assert tuned._tuning.compilations == 1


def test_clients_tune_their_own_models():
  """And a run whose states are used up goes on with its own."""
  simulator = simulator_of(lambda task: ditto(task, sgd(0.2), sgd(1.0)))
  runtime = dataclasses.replace(simulator.runtime, donate=True)
  simulator = dataclasses.replace(simulator, runtime=runtime)
  state = train_rounds(simulator, 1)
  before = jax.tree.map(np.array, jax.device_get(state))
  found = tuning_of(simulator)(state)
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
  own, w = jax.device_get(state.clients[0]), params_of(simulator, state)["w"]
  models = np.where(own.trained[:, None], own.params["w"], w)
  assert 0 < own.trained.sum() < 5
  np.testing.assert_allclose(found.total["loss"], expected(models), rtol=1e-5)


def test_clients_are_measured_with_the_buffers_of_their_tuning():
  simulator = simulator_of(
    lambda task: fedavg(task, sgd(0.2), sgd(1.0)), change=counting_steps
  )
  found = tuning_of(simulator)(train_rounds(simulator, 3))
  steps = found.per_client()["steps"][[0, 1, 2, 4]]
  np.testing.assert_array_equal(steps, 3 + STEPS)


def test_what_cannot_be_tuned_is_named():
  simulator = simulator_of(lambda task: fedavg(task, sgd(0.2), sgd(1.0)))
  bare = dataclasses.replace(
    simulator, data=dataclasses.replace(simulator.data, seen=None)
  )
  with pytest.raises(ValueError, match=r"set data\.heldout_fraction"):
    tuning_of(bare)
  task = simulator.task
  pooled = make_simulator(task, centralized(task, sgd(0.1)), simulator.data)
  with pytest.raises(ValueError, match="pools"):
    tuning_of(pooled)
