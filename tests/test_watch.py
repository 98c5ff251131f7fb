"""The best model is kept, gone back to, and part of the state."""

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training import schedules
from problems import MODELS, blobs, flat, make_simulator, params_of, sgd

METRIC = "seen/accuracy"


def watching(devices=1, metric=METRIC, **arguments) -> Simulator:
  data = blobs([5, 3, 6, 4])
  data = dataclasses.replace(data, seen=data.train)
  task = MODELS["lr"](data)
  algorithm = fedavg(task, sgd(0.3), sgd(1.0))
  base = make_simulator(task, algorithm, data, devices=devices)
  return dataclasses.replace(
    base,
    best_metric=metric,
    runtime=Runtime(lanes=1, devices=devices, rounds_per_dispatch=1),
    **arguments,
  )


def told(simulator, values, metric=METRIC):
  """Rounds after which an evaluation tells these values; all models."""
  state, models = simulator.init(), []
  for r, value in enumerate(values):
    state = simulator.dispatch(state, simulator.plan(r, 1)).state
    models.append(flat(params_of(simulator, state)))
    state = simulator.react(state, {} if value is None else {metric: value})
  return state, models


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
  ("values", "metric", "best"),
  [
    ([0.1, 0.4, 0.3], METRIC, 1),
    ([0.1, 0.4, 0.4], METRIC, 1),
    ([0.1, float("nan"), 0.2], METRIC, 2),
    ([float("nan"), None, -0.2], METRIC, 2),
    ([0.1, 0.4, 0.3], "seen/loss", 0),
    ([0.5, 0.4, 0.3], "seen/loss/p90", 2),
    ([None, None, 0.3], METRIC, 2),
  ],
)
def test_the_best_model_is_kept(values, metric, best, devices):
  simulator = watching(devices, metric)
  state, models = told(simulator, values, metric)
  assert int(state.watch.best.round) == best + 1
  kept = simulator.algorithm.variables(state.watch.best.server).params
  np.testing.assert_array_equal(flat(jax.device_get(kept)), models[best])
  np.testing.assert_array_equal(
    flat(params_of(simulator, state)), models[-1]
  )  # nobody asked to go back
  row = simulator.react.best_row(state)
  assert row["best/round"] == best + 1
  assert row[f"best/{metric}"] == pytest.approx(values[best])


def test_nothing_was_evaluated():
  simulator = watching()
  state, _ = told(simulator, [None, float("nan")])
  assert simulator.react.best_row(state) == {}


@pytest.mark.parametrize("devices", [1, 2])
def test_back_to_the_best_model(devices):
  simulator = watching(devices, revert_to_best=True)
  state, models = told(simulator, [0.1, 0.4, 0.3, None])
  after_two = simulator.init()
  for r in range(2):
    after_two = simulator.dispatch(after_two, simulator.plan(r, 1)).state
  # Round 4 began with the model after round 2.
  expected = simulator.dispatch(
    after_two._replace(round=after_two.round + 1), simulator.plan(3, 1)
  ).state
  np.testing.assert_array_equal(flat(params_of(simulator, expected)), models[3])
  assert int(state.round) == 4
  assert simulator.compilations == 1


def test_after_the_last_round_nothing_goes_back():
  simulator = watching(revert_to_best=True)
  state, _ = told(simulator, [0.4])
  state = simulator.dispatch(state, simulator.plan(1, 1)).state
  last = flat(params_of(simulator, state))
  state = simulator.react(state, {METRIC: 0.3}, ends=True)
  np.testing.assert_array_equal(flat(params_of(simulator, state)), last)
  assert int(state.watch.best.round) == 1


@pytest.mark.parametrize(
  ("field", "value"), [("revert_to_best", "no"), ("metric", 3)]
)
def test_arguments_of_another_type(field, value):
  with pytest.raises(TypeError, match="server"):
    watching(**{field: value})


def test_no_best_value_yet_to_go_back_to():
  simulator = watching(revert_to_best=True)
  state, models = told(simulator, [float("nan")])
  np.testing.assert_array_equal(flat(params_of(simulator, state)), models[0])


def test_a_state_that_was_on_the_host_goes_on_the_same():
  plateau = schedules.plateau(METRIC, factor=0.5)
  simulator = watching(
    2, revert_to_best=True, schedules={"client.learning_rate": plateau}
  )
  state, _ = told(simulator, [0.4, 0.3])
  copy = simulator.states.to_devices(
    jax.device_get(simulator.states.to_host(state))
  )
  ends = []
  for one in (state, copy):
    out = simulator.dispatch(one, simulator.plan(2, 1))
    assert out.rows[0]["client/learning_rate"] == pytest.approx(0.15)
    ends.append(flat(jax.device_get(simulator.react(out.state, {METRIC: 0.2}))))
  np.testing.assert_array_equal(ends[0], ends[1])


def test_going_back_needs_a_metric():
  with pytest.raises(
    ValueError, match=r"server\.revert_to_best=True .*best_metric"
  ):
    watching(metric=None, revert_to_best=True)


def test_a_metric_that_nobody_tells():
  with pytest.raises(ValueError, match=r"best_metric='seen/accuracies' .*mean"):
    _ = watching(metric="seen/accuracies").checked
