"""The scaling model: its arithmetic, what it counts, and measured rounds."""

import dataclasses
import itertools
import math
import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.engine import plan
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from fedjax_sim.simulation import costs as client_costs
from fedjax_sim.simulation import scaling
from fedjax_sim.simulation.compiler import Compiler
from fedjax_sim.simulation.costs import Costs, Speed
from fedjax_sim.simulation.evaluator import Evaluator
from fedjax_sim.simulation.scaling import Hardware, Model
from fedjax_sim.training.optimizers import optimizer
from problems import MODELS, blobs, make_simulator
from tiers import slow_but

SGD = optimizer("sgd", learning_rate=0.01)
SPEED = Speed(1e9, 1e9)


def simulator_of(sizes, make=MODELS["lr"], features=20, classes=10, **options):
  data = blobs(sizes, features=features, classes=classes)
  task = make(data)
  return make_simulator(task, fedavg(task, SGD, SGD), data, **options)


def model_of(simulator, devices=4, lanes=1, speed=SPEED, link=1e9, host=1e9):
  return Model(
    simulator=simulator,
    costs=client_costs.costs_of(simulator),
    hardware=Hardware(devices, link, host, speed),
    lanes=lanes,
  )


# --- arithmetic ---------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 3, 64])
def test_what_a_ring_sends(devices):
  """Every device passes every share on but its own, twice."""
  shares = np.full(devices, 1000 / devices)
  ring = 2 * (shares.sum() - shares[0])
  assert scaling.exchanged(1000, devices) == pytest.approx(ring)
  assert scaling.exchanged(1000, devices, 0) == pytest.approx(ring / 2)
  assert scaling.exchanged(1000, devices, 5) == pytest.approx(3 * ring)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_where_communication_vanishes(share):
  fixed, compute, communication = 0.3, 0.01, 0.0002
  clients = scaling.vanishing_cohort(fixed, compute, communication, share)
  spoken = fixed + clients * communication
  assert spoken / (spoken + clients * compute) == pytest.approx(share)


def test_where_communication_never_vanishes():
  assert math.isinf(scaling.vanishing_cohort(0.3, 0.01, 0.01))
  assert scaling.vanishing_cohort(0.0, 0.01, 0.0001) == 0


@pytest.mark.parametrize(
  ("count", "devices", "lanes", "virtual"),
  [(40, 1, 1, 1), (40, 3, 4, 1), (7, 4, 2, 1), (2, 5, 1, 1), (40, 6, 3, 3)],
)
def test_the_layout_is_that_of_the_plan(count, devices, lanes, virtual):
  rng = np.random.default_rng(count)
  sizes = np.ceil(rng.lognormal(2, 1, 50)).astype(np.int64)
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  batchings = [
    LocalBatching(batch_size=3, epochs=2),
    LocalBatching(batch_size=3),
  ]
  ids = rng.choice(50, count, replace=False)
  shape = plan.capacity(
    [sizes] * 2, batchings, count, lanes=lanes, devices=devices
  )
  planned = plan.plan(
    [offsets] * 2, batchings, ids, shape, seed=0, round_=0
  ).num_steps
  steps = np.stack(
    [batching.num_steps(sizes[ids]) for batching in batchings], -1
  )
  found = scaling.layout(steps, shape, virtual)

  together = lambda x: x.reshape(-1, virtual, *x.shape[1:]).sum(1)
  of_device = shape.lanes * planned.max(2).sum(1)
  np.testing.assert_array_equal(found.steps, together(of_device))
  begun = shape.lanes * planned.any((2, 3)).sum(1)
  np.testing.assert_array_equal(found.lanes, together(begun))

  costs = Costs(np.array([5.0, 1.0]), 100.0, 0, 0, 0, 0, 0, False)
  np.testing.assert_allclose(
    found.seconds(costs, Speed(2.0, 10.0)),
    together(of_device @ [2.5, 0.5] + 10.0 * begun),
  )


def test_clients_of_one_size_are_shared_out():
  """16 clients of 3 steps: 4 a device, then 3 a device and one more."""
  model = model_of(simulator_of([12] * 32))
  costs = model.costs
  client = 3 * float(costs.step_flops.sum()) + costs.client_bytes
  four = model.predict(16)
  assert four.compute_seconds == pytest.approx(4 * client / 1e9)
  assert (four.idle, four.waiting) == pytest.approx((0, 0))
  five = model.predict(17)
  assert five.compute_seconds == pytest.approx(5 * client / 1e9)
  assert five.idle == pytest.approx(1 - 17 / 20)


def test_lanes_wait_for_the_longest():
  """Half of the clients have 3 steps, half 1; the middle wave has of both."""
  simulator = simulator_of([12, 4] * 9)
  model = model_of(simulator, devices=1, lanes=6)
  assert model.predict(18).waiting == pytest.approx(1 - 36 / 42)


def test_a_cohort_beyond_the_population():
  model = model_of(simulator_of([12, 4, 8]))
  many, more = model.predict(3000), model.predict(30_000)
  assert more.compute_seconds == pytest.approx(
    10 * many.compute_seconds, rel=0.01
  )
  assert more.host_bytes == pytest.approx(10 * many.host_bytes, rel=0.01)
  assert more.network_bytes == many.network_bytes


def test_the_cohort_from_which_on_a_model_hardly_communicates():
  simulator = simulator_of([12, 40, 8], MODELS["mlp"])
  model = model_of(simulator, link=1e7, host=1e12)
  clients = model.vanishing_cohort()
  assert 100 < clients < 1e6
  at = model.predict(math.ceil(clients))
  assert at.communication == pytest.approx(scaling.SHARE, rel=0.05)
  assert model.predict(math.ceil(clients / 2)).communication > scaling.SHARE


def test_a_slow_host_is_always_felt():
  simulator = simulator_of([12, 40, 8])
  assert math.isinf(model_of(simulator, host=1e3).vanishing_cohort())


# --- what is counted ----------------------------------------------------------


def test_flops_of_logistic_regression():
  """Two products a step, x W and x^T g: 2 FLOPs an entry, example and class."""
  batch, features, classes = 20, 784, 10
  simulator = simulator_of(
    [40] * 3,
    lambda data: logistic_regression(data.example_shape, data.num_classes),
    features=features,
    classes=classes,
    batching=LocalBatching(batch_size=batch),
  )
  costs = client_costs.costs_of(simulator)
  (step,) = costs.step_flops
  parameters = features * classes + classes
  assert step == pytest.approx(4 * batch * features * classes, rel=0.1)
  assert step > 4 * batch * features * classes + 2 * parameters
  # A copy, a difference and a weighted sum read or write ten numbers or so.
  assert 8 * 4 * parameters < costs.client_bytes < 16 * 4 * parameters


def test_flops_of_a_network():
  """The gradient takes twice the forward pass, but none of the input."""
  batch, sizes = 32, (64, 128, 96, 10)
  simulator = simulator_of(
    [64] * 3,
    lambda data: mlp(data.example_shape, data.num_classes, sizes[1:-1]),
    features=64,
    batching=LocalBatching(batch_size=batch),
  )
  entries = [a * b for a, b in itertools.pairwise(sizes)]
  (step,) = client_costs.costs_of(simulator).step_flops
  products = 2 * batch * (3 * sum(entries) - entries[0])
  assert step == pytest.approx(products, rel=0.1)


def test_products_in_loops_are_counted_as_often_as_they_run():
  def loop(x, length):
    body = lambda x, _: (x @ x, None)
    return lax.scan(body, x, None, length=length)[0]

  x = jnp.ones((16, 16))
  for length in (1, 7):
    counted = client_costs.cost(lambda x, n=length: loop(x, n), x).flops
    assert counted == pytest.approx(length * 2 * 16**3, rel=0.05)


def test_what_two_devices_sum():
  """The program that XLA makes sums as many bytes as the model says."""
  simulator = simulator_of([12] * 8, MODELS["mlp"], devices=2)
  text = simulator.compiler.program(1, 8).compiled.as_text()
  shapes = re.findall(r"= f32\[(\d+)\]\S* all-reduce(?:-start)?\(", text)
  summed = 4 * sum(map(int, shapes))
  costs = client_costs.costs_of(simulator)
  assert costs.summed_bytes == pytest.approx(summed, rel=0.03)
  assert costs.summed_bytes >= 4 * simulator.states.num_parameters
  model = model_of(simulator, devices=2)
  assert model.predict(8).network_bytes == costs.summed_bytes


def test_stale_updates_are_summed_twice():
  """Those of now, and those that come late."""
  from fedjax_sim.training.stale import stale

  plain = simulator_of([5, 3])
  late = dataclasses.replace(plain, algorithm=stale(plain.algorithm, 0.3))
  costs, more = (client_costs.costs_of(s) for s in (plain, late))
  parameters = 4 * plain.states.num_parameters
  assert more.summed_bytes - costs.summed_bytes >= parameters


def test_a_stack_of_updates_goes_from_clients_to_coordinates():
  sizes = [12] * 16
  simulator = simulator_of(sizes, aggregator=aggregators.median())
  costs = client_costs.costs_of(simulator)
  update = 4 * simulator.states.num_parameters
  assert costs.update_bytes == update
  assert costs.summed_bytes < 100
  model = model_of(simulator)
  seen = model.predict(16)
  slots = 8  # twice a device's share, as dealing by steps may need
  # 3 of 4 of each slot's coordinates are others', and so is what is collected.
  assert seen.network_bytes == pytest.approx(
    3 / 4 * (slots + 1) * update, rel=0.1
  )
  assert seen.memory["sums"] > slots * update


def test_what_clients_keep_is_read_and_written():
  data = blobs([4] * 64)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task, scaffold(task, SGD, SGD), data, clients_per_round=4
  )
  model = model_of(simulator)
  row = model.costs.row_bytes
  assert row == 4 * simulator.states.num_parameters
  seen = model.predict(4)
  sums = scaling.exchanged(model.costs.summed_bytes, 4)
  rows = 3 * 3 / 4 * 4 * 2 * row  # summed, then collected; 2 slots a device
  assert seen.network_bytes == pytest.approx(sums + rows)
  assert seen.memory["kept"] == 4 * 2 * row


@pytest.mark.parametrize(
  ("residency", "lanes", "log_clients"),  # all pairs
  slow_but(
    [("device", 1, False), ("host", 3, False)],
    [
      ("device", 1, False),
      ("device", 3, True),
      ("host", 1, True),
      ("host", 3, False),
    ],
  ),
)
def test_predicted_memory_is_near_that_of_the_program(
  residency, lanes, log_clients
):
  simulator = simulator_of(
    [30, 20, 25] * 4,
    lambda data: mlp(data.example_shape, data.num_classes, (128,)),
    features=100,
    clients_per_round=6,
    lanes=lanes,
  )
  runtime = dataclasses.replace(
    simulator.runtime, residency=residency, donate=True
  )
  simulator = dataclasses.replace(
    simulator, runtime=runtime, log_clients=log_clients
  )
  memory = model_of(simulator, devices=1, lanes=lanes).predict(6).memory
  held = sum(x.nbytes for x in simulator.data.train.examples.values())
  used = held if residency == "device" else held * (4 * 30 + 2 * 25) / 300
  assert memory["examples"] == pytest.approx(used)
  compiled = simulator.compiler.program(lanes, 6).device_bytes
  assert sum(memory.values()) == pytest.approx(compiled, rel=0.2)


def test_several_hosts_hold_the_examples():
  """With more devices than here, each is sent those of its own clients."""
  simulator = simulator_of([12] * 64)
  here = model_of(simulator, devices=1).predict(64)
  held = sum(x.nbytes for x in simulator.data.train.examples.values())
  assert here.memory["examples"] == held
  assert here.host_bytes == here.memory["plan"]
  away = model_of(simulator, devices=64).predict(64)
  assert away.memory["examples"] == pytest.approx(2 * held / 64)
  assert away.host_bytes == pytest.approx(
    away.memory["plan"] + away.memory["examples"]
  )


def test_models_in_pieces_are_refused():
  simulator = simulator_of([12] * 4)
  runtime = dataclasses.replace(simulator.runtime, model_devices=1)
  simulator = dataclasses.replace(simulator, runtime=runtime)
  with pytest.raises(ValueError, match="runtime.model_devices=None"):
    client_costs.costs_of(simulator)


# --- measured rounds ----------------------------------------------------------


@pytest.mark.slow
def test_ratios_of_measured_rounds():
  """Rounds on one device take as many times as long as predicted.

  The same machine sustains the same FLOP/s whatever the cohort, the steps and
  (in products that are large enough) the model. All take turns, and a ratio is
  that of two rounds of the same turn.
  """

  def variant(hidden=256, clients=8, epochs=1):
    return simulator_of(
      [128, 384] * 16,
      lambda data: mlp(data.example_shape, data.num_classes, (hidden, hidden)),
      features=256,
      clients_per_round=clients,
      batching=LocalBatching(batch_size=64, epochs=epochs),
    )

  variants = {
    "base": variant(),
    "clients": variant(clients=32),
    "steps": variant(epochs=4),
    "model": variant(hidden=512),
  }
  base = variants["base"]
  speed, _ = client_costs.measure(base, client_costs.costs_of(base))
  predicted = {}
  for name, simulator in variants.items():
    model = model_of(simulator, devices=1, speed=speed)
    predicted[name] = model.predict(simulator.sampler.sizes[0]).compute_seconds
  states = {name: s.init() for name, s in variants.items()}
  times: dict[str, list[float]] = {name: [] for name in variants}
  for round_ in range(8):
    for name, simulator in variants.items():
      out = simulator.dispatch(states[name], simulator.plan(round_, 1))
      states[name] = out.state
      if round_:  # the first one warms up
        times[name].append(out.seconds)
  assert predicted["clients"] == pytest.approx(4 * predicted["base"], rel=0.2)
  assert predicted["model"] > 2 * predicted["base"]
  for name in variants:
    measured = statistics.median(
      a / b for a, b in zip(times[name], times["base"], strict=True)
    )
    ratio = predicted[name] / predicted["base"]
    assert ratio / 1.5 < measured < ratio * 1.5, (name, ratio, measured)


@pytest.mark.slow
def test_a_measured_rate_predicts_the_round_that_it_was_measured_on():
  simulator = simulator_of(
    [64] * 8,
    lambda data: mlp(data.example_shape, data.num_classes, (256,)),
    features=256,
    batching=LocalBatching(batch_size=32, epochs=4),
  )
  costs = client_costs.costs_of(simulator)
  speed, lanes = client_costs.measure(simulator, costs)
  assert lanes == 1
  model = model_of(simulator, devices=1, speed=speed)
  state, planned = simulator.init(), simulator.plan(0, 1)
  seconds = [simulator.dispatch(state, planned).seconds for _ in range(5)]
  predicted = model.predict(8).compute_seconds
  assert predicted / 2 < min(seconds) < 2 * predicted


def test_nothing_runs_unless_it_is_to_be_measured(monkeypatch):
  simulator = simulator_of([12] * 4)
  for owner, name in (
    (type(simulator), "init"),
    (type(simulator), "dispatch"),
    (Compiler, "call"),
    (Evaluator, "measure"),
  ):
    monkeypatch.setattr(owner, name, pytest.fail)
  monkeypatch.setattr(jax, "device_put", pytest.fail)
  model_of(simulator).predict(4)
