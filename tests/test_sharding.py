"""What several devices share: fixed orders of sums, pieces of a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fedjax_sim import aggregators, distributed, sampling, transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.core import tree as trees
from fedjax_sim.distributed import AXIS, MODEL
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.mlp import mlp
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training.optimizers import optimizer
from problems import (
  MODELS,
  blobs,
  flat,
  make_simulator,
  params_of,
  sgd,
  train,
)
from tiers import slow_but

SIZES = [1, 3, 4, 7, 9, 12, 20, 33, 5, 5, 2]


def simulator_of(
  *, model="lr", runtime, aggregator=None, steps=(), sampler=None, server=None
) -> Simulator:
  if (runtime.devices or 1) > jax.device_count():
    pytest.skip(f"needs 2 devices, there is {jax.device_count()}")
  data = blobs(SIZES, features=8, classes=4)
  task = MODELS[model](data)
  return Simulator(
    task=task,
    algorithm=fedavg(task, sgd(0.3), server or sgd(1.0)),
    data=data,
    sampler=sampler or sampling.uniform(len(SIZES), 9),
    batching=LocalBatching(batch_size=4, epochs=2),
    aggregator=aggregator or aggregators.weighted_mean(),
    transforms=steps,
    runtime=dataclasses.replace(runtime, rounds_per_dispatch=2, donate=False),
  )


def trained(simulator, rounds=3):
  return flat(params_of(simulator, train(simulator, rounds)))


def fixed(devices, virtual, lanes=1, **more):
  return Runtime(
    devices=devices, deterministic_reduction=virtual, lanes=lanes, **more
  )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
  ("model", "virtual", "lanes"),
  [
    pytest.param("lr", 3, 3, marks=pytest.mark.integration),  # 4 programs
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [("lr", 2, 1), ("mlp", 2, 3), ("mlp", 3, 1), ("mlp", 4, 3)]
    ),
  ],
)
def test_the_same_bits_on_any_number_of_devices(model, virtual, lanes):
  steps = [transforms.clip(0.5), transforms.gaussian(0.01)]
  run = lambda devices, residency: trained(
    simulator_of(
      model=model,
      steps=steps,
      runtime=fixed(devices, virtual, lanes, residency=residency),
    )
  )
  one = run(1, "device")
  np.testing.assert_array_equal(run(2, "device"), one)
  np.testing.assert_array_equal(run(2, "host"), one)
  free = simulator_of(
    model=model, steps=steps, runtime=Runtime(devices=1, lanes=lanes)
  )
  np.testing.assert_allclose(one, trained(free), atol=1e-6)


@pytest.mark.usefixtures("exact")
def test_a_free_order_gives_other_bits():
  # Otherwise the test above would show nothing.
  one, two = (
    trained(simulator_of(runtime=Runtime(devices=d, lanes=1)), 8)
    for d in (1, 2)
  )
  assert not np.array_equal(one, two)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("aggregator", slow_but(["mean"], ["mean", "sum"]))
def test_other_aggregators_in_a_fixed_order(aggregator):
  make = aggregators.AGGREGATORS[aggregator]
  one, two, free = (
    trained(simulator_of(runtime=runtime, aggregator=make()))
    for runtime in (fixed(1, 4), fixed(2, 4), Runtime(devices=1, lanes=1))
  )
  np.testing.assert_array_equal(one, two)
  np.testing.assert_allclose(one, free, atol=1e-5)


def test_a_stack_has_no_fixed_order():
  with pytest.raises(ValueError, match=r"aggregator\.name keeps a stack"):
    simulator_of(runtime=fixed(1, 4), aggregator=aggregators.median())


def test_a_sum_is_not_by_coordinate():
  sums = aggregators.mean()._replace(coordinatewise=True)
  with pytest.raises(ValueError, match="set needs_all_updates=True"):
    simulator_of(runtime=Runtime(), aggregator=sums)


def test_bytes_of_virtual_devices():
  simulator = simulator_of(runtime=fixed(1, 4, residency="host"))
  capacity = simulator.compiler.program(1, 9).shape.capacity
  residency = simulator.residency
  expected = trees.nbytes(residency.shapes(capacity, 1))
  assert residency.bytes_per_round(capacity) == expected


@pytest.mark.usefixtures("exact")
def test_a_cohort_that_leaves_virtual_devices_without_clients():
  few = sampling.poisson(len(SIZES), 1.5)
  one, two, free = (
    trained(simulator_of(runtime=runtime, sampler=few), 6)
    for runtime in (fixed(1, 5), fixed(2, 5), Runtime(devices=1, lanes=1))
  )
  np.testing.assert_array_equal(one, two)
  np.testing.assert_allclose(one, free, atol=1e-6)


@pytest.mark.usefixtures("exact")
def test_a_run_goes_on_with_the_same_bits_on_other_devices():
  one = simulator_of(runtime=fixed(1, 4))
  two = simulator_of(runtime=fixed(2, 4))
  half = two.states.to_host(train(two, 2))
  state = one.states.to_devices(half)
  for out in one.run(state, 4):
    state = out.state
  np.testing.assert_array_equal(flat(params_of(one, state)), trained(two, 4))


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"deterministic_reduction": 4}, r"lanes='auto' is measured anew"),
    ({"deterministic_reduction": 0, "lanes": 1}, "deterministic_reduction=0"),
    (
      {"deterministic_reduction": 2, "lanes": 1, "model_devices": 2},
      "model_devices does not go with",
    ),
    ({"model_devices": 0}, "model_devices=0"),
  ],
)
def test_what_does_not_go_together(fields, match):
  with pytest.raises(ValueError, match=match):
    Runtime(**fields)


def test_devices_that_cannot_share_a_model():
  with pytest.raises(ValueError, match=r"model_devices=3: 2 devices cannot be"):
    distributed.make_mesh(2, 3)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("shards", [2, 6])
def test_ordered_sum_is_a_loop(count, shards):
  rng = np.random.default_rng(0)
  tree: dict[str, np.ndarray] = {
    "kernel": rng.normal(size=(shards, 3, 5)).astype(np.float32),
    "half": rng.normal(size=(shards, 7)).astype(np.float16),
    "scalar": rng.normal(size=(shards,)).astype(np.float32),
  }
  count = min(count, shards)
  summed = jax.jit(
    jax.shard_map(
      functools.partial(distributed.ordered_sum, count=count),
      mesh=distributed.make_mesh(2),
      in_specs=P(AXIS),
      out_specs=P(),
      check_vma=False,
    )
  )(tree)
  for name, x in tree.items():
    total = x[0]
    for row in x[1:count]:
      total = total + row
    np.testing.assert_array_equal(summed[name], total, strict=True)


# --- a model in pieces --------------------------------------------------------


@pytest.mark.parametrize(
  ("model", "lanes"), slow_but([("mlp", 2)], [("lr", 1), ("mlp", 2)])
)
def test_a_model_in_pieces_trains_the_same(model, lanes):
  adam = optimizer("adam", learning_rate=0.1, eps=1e-3)
  make = lambda runtime: simulator_of(
    model=model,
    runtime=runtime,
    server=adam,
    steps=[transforms.clip(0.5)],
  )
  whole = make(Runtime(devices=1, lanes=lanes))
  pieces = make(Runtime(devices=2, model_devices=2, lanes=lanes))
  assert pieces.mesh.axis_names == (AXIS, MODEL)
  np.testing.assert_allclose(trained(pieces), trained(whole), atol=1e-6)

  state = train(pieces, 1)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.server):
    if max(leaf.shape, default=1) % 2 == 0:
      assert leaf.addressable_shards[0].data.size == leaf.size / 2, path


def test_pieces_of_client_states_and_the_way_back():
  data = blobs(SIZES, features=8, classes=4)
  task = MODELS["mlp"](data)

  def scaffolds(runtime):
    return Simulator(
      task=task,
      algorithm=scaffold(task, sgd(0.1), sgd(1.0)),
      data=data,
      sampler=sampling.uniform(len(SIZES), 9),
      runtime=dataclasses.replace(runtime, lanes=1, donate=False),
    )

  whole = scaffolds(Runtime(devices=1))
  pieces = scaffolds(Runtime(devices=2, model_devices=2))
  state = train(pieces, 3)
  table = jax.tree.leaves(state.clients)
  assert table
  for leaf in table:
    if max(leaf.shape[1:]) % 2 == 0:
      assert MODEL in leaf.sharding.spec
      assert leaf.addressable_shards[0].data.size == leaf.size / 2
  again = pieces.states.to_devices(pieces.states.to_host(state))
  for new, old in zip(
    jax.tree.leaves(again), jax.tree.leaves(state), strict=True
  ):
    np.testing.assert_array_equal(new, old)
    assert new.sharding == old.sharding
  expected = whole.states.to_host(train(whole, 3))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    pieces.states.to_host(state),
    expected,
  )


@pytest.mark.slow
def test_memory_of_a_step_is_cut():
  data = blobs([4] * 6, features=8, classes=4)
  task = mlp(data.example_shape, data.num_classes, (1024, 1024))

  def temporary(devices):
    simulator = Simulator(
      task=task,
      algorithm=fedavg(task, sgd(0.1), sgd(1.0)),
      data=data,
      sampler=sampling.uniform(6, 4),
      runtime=Runtime(devices=devices, model_devices=devices, lanes=2),
    )
    compiled = simulator.compiler.program(2, 4).compiled
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(2) < 0.6 * temporary(1)


def test_what_is_not_cut_counts_whole():
  mesh = distributed.make_mesh(2, 2)
  shapes = {
    "even": jax.ShapeDtypeStruct((6, 7), jnp.float32),
    "odd": jax.ShapeDtypeStruct((3, 5), jnp.float16),
  }
  specs = distributed.in_pieces(shapes, mesh)
  assert distributed.shard_nbytes(shapes, mesh, specs) == 4 * 21 + 2 * 15


def test_the_longest_axis_that_can_be_cut_is():
  mesh = distributed.make_mesh(2, 2)
  shapes = {
    "kernel": (6, 8),
    "tall": (10, 4),
    "odd": (3, 5),
    "odd by even": (5, 2),
    "bias": (4,),
    "step": (),
  }
  specs = distributed.in_pieces(
    {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}, mesh
  )
  assert specs == {
    "kernel": P(None, MODEL),
    "tall": P(MODEL),
    "odd": P(),
    "odd by even": P(None, MODEL),
    "bias": P(MODEL),
    "step": P(),
  }


# --- stacked aggregators ------------------------------------------------------


def test_no_device_has_the_whole_stack():
  count, numbers = 64, 512 * 4  # clients, and of a kernel
  data = blobs([4] * count, features=512, classes=4)
  task = MODELS["lr"](data)

  def temporary(devices):
    simulator = make_simulator(
      task,
      fedavg(task, sgd(0.1), sgd(1.0)),
      data,
      aggregator=aggregators.median(),
      devices=devices,
    )
    compiled = simulator.compiler.program(1, count).compiled
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()

  one, text = temporary(1)
  assert f"f32[{count},{numbers}]" in text  # the whole stack
  assert one > 2 * 4 * count * numbers
  _, text = temporary(2)
  # A device has as many rows as it might get clients, here all; then those of
  # both, of half of the coordinates.
  assert f"f32[{2 * count},{numbers // 2}]" in text
  assert f"f32[{2 * count},{numbers}]" not in text


# --- what devices send --------------------------------------------------------


@pytest.mark.parametrize("rounds", slow_but([4], [1, 4]))
def test_bytes_that_devices_send(rounds):
  data = blobs([4] * 6, features=512, classes=4)
  task = MODELS["lr"](data)

  def sent(devices, aggregator):
    simulator = make_simulator(
      task,
      fedavg(task, sgd(0.1), sgd(1.0)),
      data,
      aggregator=aggregator,
      devices=devices,
      rounds_per_dispatch=rounds,
    )
    (out,) = simulator.run(simulator.init(), 1)
    return out.sent_bytes

  numbers = 512 * 4 + 4
  assert sent(1, aggregators.weighted_mean()) == 0
  # Half of all, and the sum of the other half; and some counts and metrics.
  extra = sent(2, aggregators.weighted_mean()) - 4 * numbers
  assert 0 < extra < 100
  # Half of six rows, and the median of half.
  extra = sent(2, aggregators.median()) - 4 * numbers / 2 * (6 + 1)
  assert 0 < extra < 200
