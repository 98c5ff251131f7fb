"""The loop: dispatches, evaluations, reactions, and the iterator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import sampling, simulate
from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Metric, Pass, validate
from fedjax_sim.data import FederatedData, FederatedDataset, load_digits
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.simulation.dispatch import DivergedError
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training.optimizers import optimizer
from problems import (
  MODELS,
  blobs,
  flat,
  make_simulator,
  params_of,
  quadratic,
  sgd,
)

pytestmark = pytest.mark.usefixtures("same_programs")

SIZES = [3, 9, 1, 14, 7, 5, 5, 12]


def small(**changes):
  data = load_digits(
    num_clients=20, partition="iid", heldout_fraction=0.2, unseen_clients=4
  )
  task = MODELS["lr"](data)
  arguments = {
    "task": task,
    "algorithm": fedavg(task, sgd(0.5), sgd(1.0)),
    "data": data,
    "clients_per_round": 6,
    "rounds": 5,
    "runtime": Runtime(lanes=1, donate=False),
  }
  return {**arguments, **changes}


def test_the_iterator_yields_every_round_and_evaluates_some():
  seen = list(simulate(**small(eval_every=2)))
  assert [row["round"] for _, row in seen] == [1, 2, 3, 4, 5]
  evaluated = [row["round"] for _, row in seen if "test/accuracy" in row]
  assert evaluated == [2, 4, 5]
  last = seen[-1][1]
  assert last["test/accuracy"] > 0.8
  for name in ("seen/accuracy", "unseen/accuracy/p10", "train/loss"):
    assert name in last
  # Earlier states are still there.
  states = [state and int(state.round) for state, _ in seen]
  assert states == [None, 2, None, 4, 5]


def test_the_iterator_runs_many_rounds_in_one_call():
  arguments = small(rounds=12, eval_every=6, runtime=Runtime(lanes=1))
  calls = []
  base = arguments["algorithm"]

  def on_eval(server, metrics):
    calls.append(metrics["test/accuracy"])
    return server

  arguments["algorithm"] = base._replace(on_eval=on_eval)
  run = simulate(**arguments)
  seen = [next(run)]
  seen.extend(run)
  assert [row["round"] for _, row in seen] == list(range(1, 13))
  assert len(calls) == 2
  kept = [state for state, _ in seen if state is not None]
  assert [int(state.round) for state in kept] == [6, 12]
  # The first one is a copy: the run used up its own.
  assert all(
    np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(kept[0].server)
  )


def test_the_iterator_tells_what_was_before_a_failure():
  arguments = small(rounds=6, eval_every=6)
  base = arguments["algorithm"]

  def finish(client, carry):
    report = base.finish(client, carry)
    bad = jnp.where(client.round == 3, jnp.nan, 0)
    return report._replace(
      update=jax.tree.map(lambda u: u + bad, report.update)
    )

  arguments["algorithm"] = base._replace(finish=finish)
  run, rows = simulate(**arguments), list[float]()
  with pytest.raises(DivergedError, match="Round 4"):
    rows.extend(row["round"] for _, row in run)
  assert rows == [1, 2, 3]


def test_the_iterator_trains_as_the_simulator_does():
  arguments = small()
  *_, (state, _) = simulate(**arguments)
  assert state is not None
  clients = arguments["data"].train.num_clients
  simulator = Simulator(
    task=arguments["task"],
    algorithm=arguments["algorithm"],
    data=arguments["data"],
    sampler=sampling.uniform(clients, 6),
    runtime=Runtime(lanes=1),
  )
  for out in simulator.run(simulator.init(), 5):
    other = out.state
  np.testing.assert_array_equal(
    flat(params_of(simulator, state)), flat(params_of(simulator, other))
  )


def test_the_iterator_pools_for_a_pooled_algorithm():
  arguments = small()
  task = arguments["task"]
  arguments["algorithm"] = centralized(
    task, optimizer("adam", learning_rate=0.01)
  )
  rows = [row for _, row in simulate(**arguments)]
  assert rows[-1]["clients"] == 1
  assert rows[-1]["test/accuracy"] > 0.9


def test_the_algorithm_sees_evaluations():
  arguments = small(rounds=3)
  base = arguments["algorithm"]
  seen = []

  def on_eval(server, metrics):
    seen.append(metrics["test/accuracy"])
    zeros = jax.tree.map(jnp.zeros_like, server.variables.params)
    return server._replace(variables=server.variables._replace(params=zeros))

  arguments["algorithm"] = base._replace(on_eval=on_eval)
  states = [state for state, _ in simulate(**arguments) if state is not None]
  assert len(seen) == 3
  assert all(
    np.all(np.asarray(leaf) == 0)
    for leaf in jax.tree.leaves(states[-1].server.variables.params)
  )


def test_dispatches_end_where_something_is_to_be_done():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    data,
    clients_per_round=3,
    rounds_per_dispatch=4,
  )
  ends = [
    out.rows[-1]["round"]
    for out in simulator.run(simulator.init(), 11, stops=(3, 5))
  ]
  assert ends == [3, 5, 6, 9, 10, 11]


def test_a_state_that_is_sent_takes_the_place():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(0.0)), data, clients_per_round=3
  )
  state = simulator.init()
  dispatches = simulator.run(state, 3)
  next(dispatches)
  ones = jax.tree.map(jnp.ones_like, state.server)
  replaced = state._replace(server=ones, round=jnp.int32(1))
  out = dispatches.send(simulator.states.to_devices(replaced))
  assert np.all(flat(params_of(simulator, out.state)) == 1)


def test_a_run_that_is_done_yields_nothing():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, clients_per_round=3
  )
  state = simulator.init()._replace(round=jnp.int32(4))
  assert list(simulator.run(state, 4)) == []


def test_passes_walk_over_their_own_splits():
  """The second pass sums `x` of another split, with its own number of steps."""
  rng = np.random.default_rng(0)
  make = lambda sizes: FederatedData(
    examples={
      "x": rng.normal(size=(sum(sizes), 2)).astype(np.float32),
      "a": np.ones(sum(sizes), np.float32),
    },
    offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
  )
  extra = make([5, 1, 3])
  data = FederatedDataset(
    name="two splits",
    train=make([2, 7, 4]),
    num_classes=0,
    example_shape=(2,),
    splits={"extra": extra},
  )
  task = quadratic(2)
  base = fedavg(task, sgd(0.1), sgd(1.0))

  def start(client, trained):
    del client, trained
    return jnp.zeros(2), jnp.zeros(())

  def step(client, carry, batch, key):
    del client, key
    mask = batch.mask[:, None]
    total = jnp.sum(jnp.where(mask, batch.examples["x"], 0), axis=0)
    return carry[0] + total, carry[1] + 1

  def finish(client, trained, summed):
    report = base.finish(client, trained)
    weight = jnp.float32(1)
    metrics = {
      "sum": Metric(summed[0][0] + summed[0][1], weight),
      "steps": Metric(summed[1], weight),
    }
    return report._replace(metrics=metrics)

  two = base._replace(
    passes=(*base.passes, Pass(start, step, split="extra", epochs=1)),
    finish=finish,
  )
  simulator = make_simulator(
    task,
    two,
    data,
    batching=LocalBatching(batch_size=2, epochs=3),
    lanes=2,
    devices=2,
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  total = extra.examples["x"].sum(dtype=np.float64)
  assert out.rows[0]["train/sum"] == pytest.approx(total / 3, abs=1e-5)
  assert out.rows[0]["train/steps"] == pytest.approx((3 + 1 + 2) / 3)


def test_an_unknown_split_is_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  base = fedavg(task, sgd(0.1), sgd(1.0))
  lost = base._replace(passes=(base.passes[0]._replace(split="labelled"),))
  with pytest.raises(validate.UnknownNameError, match=r"labelled.*train"):
    make_simulator(task, lost, data)


def test_a_sampler_beyond_the_population_is_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  with pytest.raises(ValueError, match="server.clients_per_round"):
    make_simulator(
      task,
      fedavg(task, sgd(0.1), sgd(1.0)),
      data,
      sampler=sampling.uniform(100, 50),
    )


def test_a_sampler_that_breaks_its_word_is_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  liar = sampling.Sampler(
    lambda seed, r: np.arange(5), sizes=(3,), expected=3.0
  )
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, sampler=liar
  )
  with pytest.raises(ValueError, match="5 clients were drawn"):
    simulator.plan(0, 1)


def test_a_cohort_with_a_client_twice_is_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  twice = sampling.Sampler(
    lambda seed, r: np.array([1, 2, 1]), sizes=(3,), expected=3.0
  )
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, sampler=twice
  )
  with pytest.raises(ValueError, match="client 1 2 times"):
    simulator.plan(0, 1)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"lanes": 0}, "runtime.lanes=0"),
    ({"rounds_per_dispatch": 0}, "runtime.rounds_per_dispatch=0"),
    ({"eval_batch_size": -3}, "runtime.eval_batch_size=-3"),
  ],
)
def test_runtime_numbers_below_one_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Runtime(**arguments)


def test_more_devices_than_there_are_is_refused():
  data = blobs(SIZES)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, devices=99
  )
  with pytest.raises(ValueError, match="runtime.devices=99"):
    simulator.init()


def test_the_algorithm_may_keep_what_it_saw_under_donation():
  """As a fallback to the best model does."""
  data = load_digits(num_clients=10, partition="iid")
  task = MODELS["lr"](data)
  base = fedavg(task, sgd(0.5), sgd(1.0))
  best = base._replace(
    init=lambda key, hparams: (
      base.init(key, hparams),
      base.init(key, hparams).variables.params,
      jnp.zeros(()),
    ),
    broadcast=lambda state: base.broadcast(state[0]),
    apply=lambda state, *rest: (base.apply(state[0], *rest), *state[1:]),
    variables=lambda state: base.variables(state[0]),
    on_eval=lambda state, metrics: (
      state[0],
      state[0].variables.params,
      metrics["test/accuracy"],
    ),
  )
  simulator = Simulator(
    task=task,
    algorithm=best,
    data=data,
    sampler=sampling.uniform(10, 4),
    runtime=Runtime(lanes=1, rounds_per_dispatch=1),
  )
  dispatches = simulator.run(simulator.init(), 3)
  state = None
  for _ in range(3):
    out = dispatches.send(state)
    state = simulator.react(out.state, simulator.evaluate(out.state))
  assert state is not None
  assert float(state.server[2]) > 0.5
  np.testing.assert_array_equal(
    flat(state.server[1]), flat(state.server[0].variables.params)
  )


def test_lanes_are_measured_under_the_callers_settings(x64):
  data = load_digits(num_clients=10, partition="iid")
  task = MODELS["lr"](data)
  simulator = Simulator(
    task=task,
    algorithm=fedavg(task, sgd(0.5), sgd(1.0)),
    data=data,
    sampler=sampling.uniform(10, 4),
  )
  *_, last = simulator.run(simulator.init(), 2)
  assert last.rows[-1]["round"] == 2
