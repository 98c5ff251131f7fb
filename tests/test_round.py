"""The round: the same in any layout, as in closed forms, compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, sampling, transforms
from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.algorithms.fedsgd import fedsgd
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.core import Metric, Task, key_for
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.simulation.dispatch import DivergedError
from fedjax_sim.training.optimizers import optimizer
from problems import (
  MODELS,
  blobs,
  flat,
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

SIZES = [3, 9, 1, 14, 7, 5, 5, 12, 2, 6, 8, 4]


@pytest.mark.integration
@pytest.mark.parametrize(
  ("model", "precision"),
  slow_but([("mlp", "float32")], [("lr", "float64"), ("mlp", "float32")]),
)
def test_lanes_and_devices_do_not_change_the_result(model, precision, request):
  if precision == "float64":
    request.getfixturevalue("x64")
  bound = {"float32": 1e-5, "float64": 1e-10}[precision]
  data = blobs(SIZES, dtype=np.dtype(precision))
  task = MODELS[model](data)
  if precision == "float64":
    init = task.init
    task = task._replace(
      init=lambda key: jax.tree.map(lambda x: x.astype(np.float64), init(key))
    )
  algorithm = fedavg(
    task,
    optimizer("sgd", learning_rate=0.2, momentum=0.9),
    optimizer("adam", learning_rate=0.1),
  )
  results = {}
  for lanes, devices in ((1, 1), (1, 2), (3, 2), (10, 1)):
    simulator = make_simulator(
      task,
      algorithm,
      data,
      clients_per_round=10,
      lanes=lanes,
      devices=devices,
      batching=LocalBatching(batch_size=4, epochs=2),
      transforms=[transforms.clip(0.5), transforms.gaussian(0.01)],
    )
    params = flat(params_of(simulator, train(simulator, 3)))
    assert params.dtype == precision
    results[lanes, devices] = params
  reference = results[1, 1]
  assert np.abs(reference).max() > 0.1
  for params in results.values():
    difference = np.abs(params - reference).max() / np.abs(reference).max()
    assert difference <= bound


def test_full_participation_with_one_full_batch_is_a_gradient_step():
  data = blobs(SIZES)
  task = MODELS["mlp"](data)
  rate = 0.3
  simulator = make_simulator(
    task,
    fedavg(task, sgd(rate), sgd(1.0)),
    data,
    batching=LocalBatching(batch_size=max(SIZES)),
    lanes=3,
    devices=2,
  )
  before = params_of(simulator, simulator.init())
  after = params_of(simulator, train(simulator, 1))

  def pooled_loss(params):
    examples = jax.tree.map(jnp.asarray, dict(data.train.examples))
    return jnp.mean(
      task.loss(
        variables._replace(params=params), examples, jax.random.key(0)
      ).value
    )

  variables = jax.jit(task.init)(jax.random.key(0))
  gradient = jax.jit(jax.grad(pooled_loss))(before)
  expected = jax.tree.map(
    lambda p, g: p - rate * np.asarray(g), before, gradient
  )
  np.testing.assert_allclose(flat(after), flat(expected), atol=2e-6)


def test_fedsgd_and_centralized_training_take_the_same_step():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  batching = LocalBatching(batch_size=sum(SIZES))
  results = [
    params_of(simulator, train(simulator, 4))
    for simulator in (
      make_simulator(
        task, fedsgd(task, sgd(0.3)), data, batching=LocalBatching(batch_size=4)
      ),
      make_simulator(
        task, centralized(task, sgd(0.3)), data, batching=batching
      ),
    )
  ]
  first, second = map(flat, results)
  np.testing.assert_allclose(first, second, atol=1e-6)


def test_centralized_training_is_optax_on_the_pooled_data():
  """Adam keeps its state from round to round, and epochs are whole."""
  data = blobs([6, 10])
  task = MODELS["lr"](data)
  opt = optimizer("adam", learning_rate=0.05)
  simulator = make_simulator(
    task,
    centralized(task, opt),
    data,
    batching=LocalBatching(batch_size=5, shuffle=False),
  )
  after = params_of(simulator, train(simulator, 3))

  import optax

  transformation = optax.adam(0.05)
  params = params_of(simulator, simulator.init())
  state = transformation.init(params)
  x, y = data.train.examples["x"], data.train.examples["y"]

  def loss(params, examples):
    return jnp.mean(
      task.loss(
        variables._replace(params=params), examples, jax.random.key(0)
      ).value
    )

  @jax.jit
  def step(params, state, examples):
    gradient = jax.grad(loss)(params, examples)
    updates, state = transformation.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  variables = jax.jit(task.init)(jax.random.key(0))
  for _ in range(3):
    for first in range(0, 16, 5):
      rows = slice(first, first + 5)
      params, state = step(params, state, {"x": x[rows], "y": y[rows]})
  np.testing.assert_allclose(flat(after), flat(params), atol=1e-5)


def test_fedprox_takes_the_proximal_gradient():
  """One client, k steps on a/2 (w - b)^2 + mu/2 (w - w_t)^2, from w_t = 0."""
  rate, mu, a, b, steps = 0.1, 0.7, 1.5, np.array([2.0, -1.0]), 4
  task = quadratic(2)
  simulator = make_simulator(
    task,
    fedprox(task, sgd(rate), sgd(1.0), mu=mu),
    quadratic_data([b], [a]),
    batching=LocalBatching(batch_size=1, steps=steps),
  )
  w, start = np.zeros(2), np.zeros(2)
  for _ in range(3):
    start = w
    for _ in range(steps):
      w = w - rate * (a * (w - b) + mu * (w - start))
  np.testing.assert_allclose(
    params_of(simulator, train(simulator, 3))["w"], w, rtol=1e-5
  )


def test_fedprox_without_mu_is_fedavg():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  results = [
    params_of(simulator, train(simulator, 2))
    for simulator in (
      make_simulator(task, fedavg(task, sgd(0.2), sgd(1.0)), data),
      make_simulator(task, fedprox(task, sgd(0.2), sgd(1.0), mu=0.0), data),
    )
  ]
  first, second = map(flat, results)
  np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("count", [4, 5])
def test_the_median_round_is_numpys(count):
  centres = np.random.default_rng(0).normal(size=(count, 3))
  task = quadratic(3)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    quadratic_data(centres),
    batching=LocalBatching(batch_size=1),
    aggregator=aggregators.median(),
    lanes=2,
    devices=2,
  )
  after = params_of(simulator, train(simulator, 1))["w"]
  updates = 0.1 * centres.astype(np.float32)
  np.testing.assert_allclose(after, np.median(updates, axis=0), rtol=1e-6)


def test_weights_are_numbers_of_examples_or_uniform():
  centres = np.array([[1.0], [4.0]])
  train_data = FederatedData(
    examples={
      "x": np.repeat(centres, [1, 3], axis=0).astype(np.float32),
      "a": np.ones(4, np.float32),
    },
    offsets=np.array([0, 1, 4]),
  )
  data = FederatedDataset(
    name="two", train=train_data, num_classes=0, example_shape=(1,)
  )
  task = quadratic(1)
  for weighting, expected in (("examples", 3.25), ("uniform", 2.5)):
    simulator = make_simulator(
      task,
      fedavg(task, sgd(1.0), sgd(1.0), weighting=weighting),
      data,
      batching=LocalBatching(batch_size=3),
    )
    got = params_of(simulator, train(simulator, 1))["w"]
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


@pytest.mark.slow
def test_whole_runs_can_be_vmapped_over_seeds_and_rates():
  data = blobs(SIZES)
  task = MODELS["mlp"](data)
  algorithm = scaffold(
    task, sgd(0.1), sgd(1.0)
  )  # a table of client states, too
  settings = [(0, 0.05), (7, 0.2)]

  def simulator_of(seed):
    return make_simulator(
      task, algorithm, data, clients_per_round=5, seed=seed, lanes=2, devices=2
    )

  single = []
  for seed, rate in settings:
    simulator = simulator_of(seed)
    hparams = hparams_of(simulator, client={"learning_rate": rate})
    single.append(flat(params_of(simulator, train(simulator, 3, hparams))))

  simulators = [simulator_of(seed) for seed, _ in settings]
  stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  states = stack([s.init() for s in simulators])
  hparams = stack(
    [
      jax.tree.map(np.float32, hparams_of(s, client={"learning_rate": rate}))
      for s, (_, rate) in zip(simulators, settings, strict=True)
    ]
  )
  rounds = jax.jit(
    jax.vmap(simulators[0].compiler.function, in_axes=(0, 0, None, 0, None))
  )
  examples = {"train": jax.tree.map(jnp.asarray, dict(data.train.examples))}
  for r in range(3):
    cohorts = stack([s.plan(r, 1).cohorts for s in simulators])
    states, _ = rounds(states, hparams, examples, cohorts, jnp.int32(1))
  both = simulators[0].algorithm.variables(states.server).params
  for i, expected in enumerate(single):
    got = flat(jax.tree.map(lambda x, i=i: np.asarray(x[i]), both))
    np.testing.assert_allclose(got, expected, atol=1e-5)
  assert np.abs(single[0] - single[1]).max() > 1e-2


def test_a_round_can_be_differentiated_forwards():
  """One step on 1/2 (w - b)^2 from 0: d w / d rate is the mean of b."""
  task = quadratic(1)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    quadratic_data([[1.0], [3.0]]),
    batching=LocalBatching(batch_size=1),
    lanes=2,
  )
  plan = jax.tree.map(jnp.asarray, simulator.plan(0, 1).cohorts)
  state = simulator.init()
  examples = {
    "train": jax.tree.map(jnp.asarray, dict(simulator.data.train.examples))
  }

  def after(rate):
    hparams = jax.tree.map(jnp.float32, dict(simulator.hparams))
    algorithm = hparams["algorithm"]
    client = {**algorithm["client"], "learning_rate": rate}
    hparams["algorithm"] = {**algorithm, "client": client}
    new, _ = simulator.compiler.function(
      state, hparams, examples, plan, jnp.int32(1)
    )
    return new.server.variables.params["w"][0]

  value, slope = jax.jvp(after, (jnp.float32(0.1),), (jnp.float32(1.0),))
  assert float(value) == pytest.approx(0.2)
  assert float(slope) == pytest.approx(2.0)


def test_nothing_is_traced_twice():
  """Cohorts, rounds and hyper-parameters change; the round is traced once."""
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  traces = []

  def loss(variables, examples, key):
    traces.append(1)
    return task.loss(variables, examples, key)

  counted = task._replace(loss=loss)
  simulator = make_simulator(
    counted,
    fedavg(counted, sgd(0.1), sgd(1.0)),
    data,
    clients_per_round=4,
    rounds_per_dispatch=3,
    lanes=2,
    devices=2,
  )
  state = simulator.init()
  for out in simulator.run(state, 5):
    state = out.state
  once = len(traces)
  rates = hparams_of(simulator, client={"learning_rate": 0.7})
  changed = None
  for out in simulator.run(state, 9, hparams=rates):
    changed = out
  assert changed is not None
  assert len(traces) == once
  assert simulator.compilations == 1


def test_poisson_cohorts_compile_at_most_three_programs():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  sampler = sampling.poisson(len(SIZES), 2.0)._replace(sizes=(4, 7, 12))
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    data,
    sampler=sampler,
    rounds_per_dispatch=4,
    devices=2,
  )
  sizes = [len(sampler.sample(0, r)) for r in range(60)]
  assert min(sizes) == 0
  assert max(sizes) > 4
  rows = []
  for out in simulator.run(simulator.init(), 60):
    rows += out.rows
  assert [row["clients"] for row in rows] == sizes
  assert 2 <= simulator.compilations <= 3


@pytest.mark.usefixtures("exact")
def test_chunks_of_rounds_give_bit_identical_states():
  data = blobs(SIZES)
  task = MODELS["mlp"](data)
  results = []
  for rounds_per_dispatch in (1, 4):
    simulator = make_simulator(
      task,
      fedavg(task, sgd(0.1), optimizer("yogi", learning_rate=0.1)),
      data,
      clients_per_round=5,
      rounds_per_dispatch=rounds_per_dispatch,
      devices=2,
    )
    results.append(flat(params_of(simulator, train(simulator, 7))))
  first, second = results
  np.testing.assert_array_equal(first, second)


def _breaking(task: Task, label: int) -> Task:
  """The task, with a NaN loss for examples of this label."""

  def loss(variables, examples, key):
    out = task.loss(variables, examples, key)
    bad = examples["y"] == label
    return out._replace(value=out.value * jnp.where(bad, jnp.nan, 1))

  return task._replace(loss=loss)


def _one_label_a_client():
  y = np.repeat([0, 1, 2, 1], 4).astype(np.int32)
  x = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  return FederatedDataset(
    name="labels",
    train=FederatedData(examples={"x": x, "y": y}, offsets=np.arange(0, 20, 4)),
    num_classes=3,
    example_shape=(5,),
  )


@pytest.mark.parametrize(
  "aggregator", slow_but(["weighted_mean"], ["weighted_mean", "median"])
)
def test_a_client_that_is_not_finite_is_left_out(aggregator):
  data = _one_label_a_client()
  plain = MODELS["lr"](data)

  def run(task, ids):
    sampler = sampling.Sampler(
      lambda seed, r: np.array(ids), sizes=(4,), expected=float(len(ids))
    )
    simulator = make_simulator(
      task,
      scaffold(task, sgd(0.1), sgd(1.0)),
      data,
      sampler=sampler,
      aggregator=aggregators.AGGREGATORS[aggregator](),
      lanes=2,
      devices=2,
    )
    out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
    return simulator, out

  simulator, out = run(_breaking(plain, 2), [0, 1, 2, 3])
  assert out.rows[0]["clients"] == 3
  assert out.rows[0]["clients_rejected"] == 1
  ((round_, ids),) = out.rejected
  assert (round_, ids.tolist()) == (1, [2])
  assert np.isfinite(out.rows[0]["train/loss"])
  # As if it had not been asked, and its state is not written.
  _, without = run(plain, [0, 1, 3])
  np.testing.assert_allclose(
    flat(params_of(simulator, out.state)),
    flat(params_of(simulator, without.state)),
    atol=1e-7,
  )
  kept = out.state.clients[0]["linear"]["kernel"]
  kept = np.asarray(jax.tree.leaves(kept)[0])
  assert np.all(kept[2] == 0)
  assert np.all(np.any(kept[[0, 1, 3]] != 0, axis=(1, 2)))


def test_a_round_without_any_finite_client_stops_with_its_number():
  data = _one_label_a_client()
  task = _breaking(MODELS["lr"](data), 1)
  sampler = sampling.Sampler(
    lambda seed, r: np.array([[0, 2], [1, 3]][r % 2]), sizes=(2,), expected=2.0
  )
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, sampler=sampler
  )
  with pytest.raises(DivergedError, match=r"Round 2: .*all 2.*1, 3"):
    train(simulator, 3)


def test_an_empty_cohort_changes_nothing_but_the_round():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  sampler = sampling.Sampler(
    lambda seed, r: np.zeros(0, np.int64), sizes=(4,), expected=1.0
  )
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), optimizer("adam", learning_rate=0.1)),
    data,
    sampler=sampler,
    devices=2,
  )
  before = simulator.init()
  out = simulator.dispatch(before, simulator.plan(0, 1))
  assert out.rows[0]["clients"] == 0
  for a, b in zip(
    jax.tree.leaves(before.server),
    jax.tree.leaves(out.state.server),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert int(out.state.round) == 1


def test_only_clients_that_took_part_write_their_state():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    scaffold(task, sgd(0.1), sgd(1.0)),
    data,
    clients_per_round=4,
    lanes=3,
    devices=2,
  )
  ids = simulator.sampler.sample(0, 0)
  state = train(simulator, 1)
  table = np.asarray(jax.tree.leaves(state.clients[0])[0])
  written = np.flatnonzero(np.any(table.reshape(len(table), -1) != 0, axis=1))
  np.testing.assert_array_equal(written, ids)


def test_clients_have_their_own_keys():
  """Noise drawn by a client depends on seed, round and client, on no layout."""

  def noisy(seed, lanes):
    task = quadratic(2)
    base = fedavg(task, sgd(0.0), sgd(1.0), weighting="uniform")

    def finish(client, carry):
      report = base.finish(client, carry)
      noise = jax.random.normal(client.key, (2,))
      return report._replace(
        update={"w": noise},
        metrics={"noise": Metric(noise[0], jnp.float32(1))},
      )

    simulator = make_simulator(
      task,
      base._replace(finish=finish),
      quadratic_data(np.zeros((4, 2))),
      batching=LocalBatching(batch_size=1),
      seed=seed,
      lanes=lanes,
    )
    return params_of(simulator, train(simulator, 2))["w"]

  np.testing.assert_allclose(noisy(0, 1), noisy(0, 3), atol=1e-6)
  assert np.abs(noisy(0, 1) - noisy(1, 1)).max() > 1e-3


def test_keys_of_different_purposes_differ():
  from fedjax_sim.core import Purpose

  keys = {
    tuple(jax.random.key_data(key_for(0, p, i)).tolist())
    for p in Purpose
    for i in range(3)
  }
  assert len(keys) == 3 * len(Purpose)


def test_bytes_are_counted_from_the_first_round():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, clients_per_round=5
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  params = (6 * 3 + 3) * 4
  assert out.rows[0]["bytes_down"] == 5 * params
  assert out.rows[0]["bytes_up"] == 5 * (params + 4)


def test_the_donated_state_is_used_up():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, clients_per_round=5
  )
  import dataclasses

  donating = dataclasses.replace(
    simulator, runtime=dataclasses.replace(simulator.runtime, donate=True)
  )
  state = donating.init()
  donating.dispatch(state, donating.plan(0, 1))
  assert all(x.is_deleted() for x in jax.tree.leaves(state.server))


def test_wrong_hyper_parameters_are_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  with pytest.raises(ValueError, match="structure"):
    simulator.init({"algorithm": {"client": {"rate": 0.1}}})


def test_two_transforms_of_one_name_are_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  make = functools.partial(
    make_simulator, task, fedavg(task, sgd(0.1), sgd(1.0)), data
  )
  with pytest.raises(ValueError, match="twice"):
    make(transforms=[transforms.clip(1.0), transforms.clip(2.0)])


def test_a_full_gradient_takes_all_examples():
  """Whatever the clients' work: the mean of 0, 0, 0, 0, 100 is 20."""
  task = quadratic(1)
  data = quadratic_data([[20.0]], copies=5)
  x = np.array([[0.0], [0.0], [0.0], [0.0], [100.0]], np.float32)
  data.train.examples["x"][:] = x
  simulator = make_simulator(
    task,
    fedsgd(task, sgd(1.0)),
    data,
    batching=LocalBatching(batch_size=2, drop_remainder=True, max_examples=3),
  )
  after = params_of(simulator, train(simulator, 1))["w"]
  np.testing.assert_allclose(after, [20.0], rtol=1e-6)


def test_rounds_before_a_failure_are_kept():
  """Whatever the number of rounds in a dispatch."""
  task = quadratic(1)
  rates = fedavg(task, sgd(1e30), sgd(1.0))
  for at_once in (1, 4):
    simulator = make_simulator(
      task,
      rates,
      quadratic_data([[1.0]]),
      batching=LocalBatching(batch_size=1),
      rounds_per_dispatch=at_once,
    )
    rows: list[dict[str, float]] = []
    dispatches = simulator.run(simulator.init(), 8)
    with pytest.raises(DivergedError, match="Round 2"):
      rows.extend(row for out in dispatches for row in out.rows)
    assert [row["round"] for row in rows] == [1]


def test_a_global_model_that_is_not_finite_stops_the_run():
  task = quadratic(1)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(1.0), sgd(3e38)),
    quadratic_data([[1e3]]),
    batching=LocalBatching(batch_size=1),
  )
  with pytest.raises(DivergedError, match=r"Round 1: .*server\.learning_rate"):
    train(simulator, 3)


def test_a_client_whose_state_is_not_finite_is_left_out():
  task = quadratic(1)
  base = fedavg(task, sgd(0.1), sgd(1.0))

  def finish(client, carry):
    report = base.finish(client, carry)
    return report._replace(state=jnp.where(client.id == 1, jnp.nan, 1.0))

  simulator = make_simulator(
    task,
    base._replace(
      finish=finish, client_init=lambda server, hparams: jnp.zeros(())
    ),
    quadratic_data([[1.0], [2.0], [3.0]]),
    batching=LocalBatching(batch_size=1),
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  assert out.rows[0]["clients_rejected"] == 1
  np.testing.assert_array_equal(out.state.clients[0][:3], [1, 0, 1])


def test_a_client_state_that_changes_its_shape_is_refused():
  task = quadratic(1)
  base = fedavg(task, sgd(0.1), sgd(1.0))
  changed = base._replace(
    finish=lambda client, carry: base.finish(client, carry)._replace(
      state=jnp.zeros((2,))
    ),
    client_init=lambda server, hparams: jnp.zeros((3,)),
  )
  simulator = make_simulator(task, changed, quadratic_data([[1.0]]))
  with pytest.raises(TypeError, match=r"float32\(3,\).*float32\(2,\)"):
    simulator.compiler.program(1, 1)


def test_a_plan_of_other_rounds_is_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  with pytest.raises(ValueError, match="plan is of round 6"):
    simulator.dispatch(simulator.init(), simulator.plan(5, 1))


def test_numbers_beyond_the_devices_dtypes_are_refused():
  data = blobs(SIZES)
  big = {"x": data.train.examples["x"].astype(np.float64) * 1e40}
  train_data = FederatedData(
    examples={**big, "y": data.train.examples["y"]}, offsets=data.train.offsets
  )
  data = FederatedDataset(
    name="big", train=train_data, num_classes=3, example_shape=(6,)
  )
  task = MODELS["lr"](data)
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  with pytest.raises(ValueError, match="field 'x' of train .*float32"):
    simulator.init()
