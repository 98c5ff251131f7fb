"""Where the examples are changes no result."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from fedjax_sim import distributed
from fedjax_sim.algorithms.ditto import ditto
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.mime_lite import mime_lite
from fedjax_sim.distributed import memory
from fedjax_sim.engine import residency
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.training.optimizers import optimizer
from problems import MODELS, blobs, make_simulator, sgd
from tiers import slow_but

HEAVY = optimizer("sgd", learning_rate=0.1, momentum=0.9)
ALGORITHMS = {
  "fedavg": lambda task: fedavg(task, sgd(0.1), sgd(1.0)),
  "ditto": lambda task: ditto(task, sgd(0.1), sgd(1.0)),  # keeps a row a client
  # Two passes over one split, and a state beside the model.
  "mime_lite": lambda task: mime_lite(task, HEAVY, sgd(1.0)),
}


def run(simulator, **changes):
  runtime = Runtime(lanes=2, rounds_per_dispatch=2, **changes)
  simulator = dataclasses.replace(simulator, runtime=runtime)
  state = simulator.init()
  rows: list[dict[str, float]] = []
  while len(rows) < 5:
    out = simulator.dispatch(state, simulator.plan(len(rows), 5 - len(rows)))
    assert out.failure is None
    state, rows = out.state, rows + out.rows
  assert simulator.compilations == 1
  return jax.tree.leaves(simulator.states.to_host(state)), rows


WORKS = {
  "epochs": LocalBatching(batch_size=4, epochs=2),
  "steps": LocalBatching(batch_size=4, steps=3, max_examples=6),
}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
  ("name", "devices", "batching"),
  slow_but(
    [("ditto", 2, "epochs")],
    itertools.product(ALGORITHMS, [1, 2], WORKS),
  ),
)
def test_host_and_device_are_bit_identical(name, batching, devices):
  data = blobs([3, 9, 1, 14, 6, 8, 5])
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    ALGORITHMS[name](task),
    data,
    clients_per_round=4,
    batching=WORKS[batching],
  )
  (one, rows), (other, same) = (
    run(simulator, devices=devices, residency=where)
    for where in ("device", "host")
  )
  assert rows == same
  for x, y in zip(one, other, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", slow_but(["fedavg", "ditto"], ALGORITHMS))
def test_a_state_goes_on_with_other_devices(name):
  """What `fetch` gives on one device, `place` takes on two."""
  data = blobs([3, 9, 1, 14, 6, 8, 5])
  task = MODELS["lr"](data)
  one, two = (
    make_simulator(task, ALGORITHMS[name](task), data, devices=devices)
    for devices in (1, 2)
  )
  state = one.dispatch(one.init(), one.plan(0, 1)).state
  moved = two.states.to_devices(one.states.to_host(state))
  for x, y in zip(
    *(
      jax.tree.leaves(s.states.to_host(t))
      for s, t in ((one, state), (two, moved))
    ),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  after = [s.dispatch(t, s.plan(1, 1)) for s, t in ((one, state), (two, moved))]
  for x, y in zip(
    *(jax.tree.leaves(out.state.server) for out in after), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=1e-6)


def test_room_for_evaluation(monkeypatch):
  mesh = distributed.make_mesh(1)
  room = residency.evaluation_room
  monkeypatch.setattr(memory, "memory_limit", lambda device: 12_000_000_000)
  assert room("auto", "device", mesh, 3) == 1e9
  assert room("host", "host", mesh, 2) == 1.5e9
  assert room("device", "device", mesh, 3) == np.inf
  assert room("disk", "disk", mesh, 3) == 2**28
  monkeypatch.setattr(memory, "memory_limit", lambda device: 1200)
  assert room("auto", "disk", mesh, 3) == 100
