"""The same engine on a GPU."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.distributed import AXIS
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from problems import MODELS, blobs, flat, make_simulator, params_of, sgd, train

pytestmark = pytest.mark.gpu

SIZES = np.random.default_rng(0).lognormal(3, 1, 200).astype(int) + 1


def simulator_of(lanes, clients_per_round=100):
  data = blobs(SIZES, features=64, classes=10)
  task = MODELS["mlp"](data)
  algorithm = fedavg(task, sgd(0.1), optimizer("adam", learning_rate=0.01))
  return make_simulator(
    task,
    algorithm,
    data,
    clients_per_round=clients_per_round,
    batching=LocalBatching(batch_size=8),
    lanes=lanes,
  )


def on_cpu(simulator):
  """The same simulator on one CPU device."""
  moved = dataclasses.replace(simulator)
  mesh = jax.make_mesh(
    (1,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:1]
  )
  moved.__dict__["mesh"] = mesh  # where the cached property keeps it
  return moved


@pytest.mark.parametrize("lanes", [1, 25])
def test_a_run_ends_where_it_ends_on_the_cpu(lanes):
  simulator = simulator_of(lanes)
  assert simulator.mesh.devices.flat[0].platform == "gpu"
  with jax.default_matmul_precision("highest"):
    got = flat(params_of(simulator, train(simulator, 3)))
    reference = on_cpu(simulator)
    expected = flat(params_of(reference, train(reference, 3)))
  assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_many_lanes_are_chosen_where_they_are_faster():
  simulator = simulator_of("auto")
  assert simulator.choose_lanes().lanes > 1, simulator.choose_lanes().reason


def test_a_dispatch_moves_nothing_by_the_way():
  simulator = simulator_of(4)
  state = simulator.init()
  simulator.dispatch(state, simulator.plan(0, 1))  # places the examples
  with jax.transfer_guard("disallow"):
    out = simulator.dispatch(state, simulator.plan(0, 1))
  assert out.rows[0]["clients"] == 100
