"""The best models are kept, gone back to, and part of the state."""

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training import schedules
from problems import MODELS, blobs, flat, make_simulator, params_of, sgd
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("same_programs")

METRIC = "seen/accuracy"
LOSS = "seen/loss"


def watching(devices=1, metrics=(METRIC,), **arguments) -> Simulator:
  data = blobs([5, 3, 6, 4])
  data = dataclasses.replace(data, seen=data.train)
  task = MODELS["lr"](data)
  algorithm = fedavg(task, sgd(0.3), sgd(1.0))
  base = make_simulator(task, algorithm, data, devices=devices)
  return dataclasses.replace(
    base,
    best_metrics=metrics,
    runtime=Runtime(lanes=1, devices=devices, rounds_per_dispatch=1),
    **arguments,
  )


def told(simulator, values, metric=METRIC):
  """Rounds after which an evaluation tells these values; all models."""
  rows = [{} if value is None else {metric: value} for value in values]
  return after_rows(simulator, rows)


def after_rows(simulator, rows):
  """The state after rounds whose evaluations give these rows; all models."""
  state, models = simulator.init(), []
  for r, row in enumerate(rows):
    state = simulator.dispatch(state, simulator.plan(r, 1)).state
    models.append(flat(params_of(simulator, state)))
    state = simulator.react(state, row)
  return state, models


def kept_model(simulator, state, metric=METRIC):
  """The best model by a metric."""
  best = state.watch.best[metric].server
  return flat(jax.device_get(simulator.algorithm.variables(best).params))


@pytest.mark.parametrize("devices", slow_but([2], [1, 2]))
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
  simulator = watching(devices, (metric,))
  state, models = told(simulator, values, metric)
  assert int(state.watch.best[metric].round) == best + 1
  kept = kept_model(simulator, state, metric)
  np.testing.assert_array_equal(kept, models[best])
  np.testing.assert_array_equal(
    flat(params_of(simulator, state)), models[-1]
  )  # nobody asked to go back
  row = simulator.react.best_row(state)
  assert row == {
    f"best/{metric}": pytest.approx(values[best]),
    f"best/{metric}/round": best + 1,
  }


@pytest.mark.parametrize("reverts", [False, True])
@pytest.mark.parametrize("metrics", [(METRIC, LOSS), (LOSS, METRIC)])
def test_each_metric_has_a_best_model_of_its_own(metrics, reverts):
  simulator = watching(metrics=metrics, revert_to_best=reverts)
  rows = [
    {METRIC: 0.1, LOSS: 0.4},
    {METRIC: 0.5, LOSS: 0.6},  # the most accurate
    {METRIC: 0.3, LOSS: 0.2},  # the smallest loss
    {METRIC: 0.4},
    {METRIC: 0.4, LOSS: 0.3},
  ]
  state, models = after_rows(simulator, rows)
  best = {METRIC: 2, LOSS: 3}
  for metric, round_ in best.items():
    assert int(state.watch.best[metric].round) == round_
    np.testing.assert_array_equal(
      kept_model(simulator, state, metric), models[round_ - 1]
    )
  assert not np.array_equal(models[1], models[2])
  assert list(simulator.react.best_row(state).items()) == [
    item
    for metric in metrics
    for item in (
      (f"best/{metric}", pytest.approx(rows[best[metric] - 1][metric])),
      (f"best/{metric}/round", best[metric]),
    )
  ]
  # The run goes back to the best model by the first metric alone.
  goes_on_with = best[metrics[0]] if reverts else len(rows)
  np.testing.assert_array_equal(
    flat(params_of(simulator, state)), models[goes_on_with - 1]
  )
  # The next round takes over the whole state, and leaves them as they are.
  out = simulator.dispatch(state, simulator.plan(len(rows), 1))
  assert out.failure is None
  for metric, round_ in best.items():
    np.testing.assert_array_equal(
      kept_model(simulator, out.state, metric), models[round_ - 1]
    )


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
  assert int(state.watch.best[METRIC].round) == 1


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    (
      {"revert_to_best": "no"},
      TypeError,
      r"server\.revert_to_best='no' is a str",
    ),
    (
      {"metrics": "test/loss"},
      TypeError,
      r"server\.best_metrics='test/loss' is a str; .*: \('test/loss',\)\.",
    ),
    (
      {"metrics": 3},
      TypeError,
      r"server\.best_metrics is a int; .* \('test/accuracy',\)\.",
    ),
    (
      {"metrics": (METRIC, 3)},
      TypeError,
      r"server\.best_metrics\[1\] is a int; .* 'test/accuracy'\.",
    ),
    (
      {"metrics": (METRIC, LOSS, METRIC)},
      ValueError,
      r"server\.best_metrics has 'seen/accuracy' twice; leave one",
    ),
    (
      {"metrics": (), "revert_to_best": True},
      ValueError,
      r"server\.revert_to_best=True .* server\.best_metrics, .*',\)\.",
    ),
  ],
)
def test_arguments_that_are_refused(arguments, error, message):
  with pytest.raises(error, match=message):
    watching(**arguments)


def test_no_best_value_yet_to_go_back_to():
  simulator = watching(revert_to_best=True)
  state, models = told(simulator, [float("nan")])
  np.testing.assert_array_equal(flat(params_of(simulator, state)), models[0])


def test_a_state_that_was_on_the_host_goes_on_the_same():
  plateau = schedules.plateau(METRIC, factor=0.5)
  simulator = watching(
    2,
    (METRIC, LOSS),
    revert_to_best=True,
    schedules={"client.learning_rate": plateau},
  )
  rows = [{METRIC: 0.4, LOSS: 0.2}, {METRIC: 0.3, LOSS: 0.1}]
  state, models = after_rows(simulator, rows)
  copy = simulator.states.to_devices(
    jax.device_get(simulator.states.to_host(state))
  )
  for metric, model in zip((METRIC, LOSS), models, strict=True):
    np.testing.assert_array_equal(kept_model(simulator, copy, metric), model)
  ends = []
  for one in (state, copy):
    out = simulator.dispatch(one, simulator.plan(2, 1))
    assert out.rows[0]["client/learning_rate"] == pytest.approx(0.15)
    ends.append(flat(jax.device_get(simulator.react(out.state, {METRIC: 0.2}))))
  np.testing.assert_array_equal(ends[0], ends[1])


def test_a_metric_that_nobody_tells():
  message = r"server\.best_metrics\[1\]='seen/accuracies' .*mean"
  with pytest.raises(ValueError, match=message):
    _ = watching(metrics=(METRIC, "seen/accuracies")).checked
