"""Factors against closed forms; a run follows them and compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim import Runtime, sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Task, validate
from fedjax_sim.engine import hparams as engine_hparams
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training import schedules
from problems import (
  MODELS,
  blobs,
  flat,
  hparams_of,
  make_simulator,
  params_of,
  sgd,
)
from tiers import slow_but


def factors(schedule, rounds):
  state = schedule.init()
  return [float(schedule.factor(jnp.int32(r), state)) for r in range(rounds)]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("step(every=3, factor=0.5)", lambda r: 0.5 ** (r // 3)),
    ("step(every=2)", lambda r: 0.1 ** (r // 2)),
    (
      "multi_step(at=(2, 5), factor=0.5)",
      lambda r: 0.5 ** ((r >= 2) + (r >= 5)),
    ),
    ("linear(rounds=4)", lambda r: min(r / 4, 1)),
    (
      "linear(rounds=4, start=0.2, begin=3)",
      lambda r: 0.2 + 0.8 * min(max(r - 3, 0) / 4, 1),
    ),
    ("cosine(rounds=6)", lambda r: (1 + np.cos(np.pi * min(r, 6) / 6)) / 2),
    (
      "cosine(rounds=6, floor=0.1)",
      lambda r: 0.1 + 0.9 * (1 + np.cos(np.pi * min(r, 6) / 6)) / 2,
    ),
    (
      "ramp_keep_decay(ramp=4, keep=2, decay=3, floor=0.1)",
      lambda r: (r + 1) / 4 if r < 4 else 0.1 ** (np.clip(r - 5, 0, 3) / 3),
    ),
    (
      "ramp_keep_decay(ramp=1, keep=0, decay=2)",
      lambda r: 0.01 ** (min(r, 2) / 2),
    ),
  ],
)
def test_factors_of_the_round(text, expected):
  found = factors(schedules.parse("client.schedule", text), 12)
  np.testing.assert_allclose(found, [expected(r) for r in range(12)], rtol=1e-5)


def test_steps_come_on_time_in_a_compiled_loop():
  for every in [1, 2, 3, 7, 10, 41, 49, 107, 1000, 12345]:
    schedule = schedules.step(every, 0.5)
    compiled = jax.jit(jax.vmap(lambda r, s=schedule: s.factor(r, ())))
    rounds = np.array([0, every - 1, every, 2 * every - 1, 2 * every])
    found = compiled(jnp.asarray(rounds))
    np.testing.assert_allclose(
      found, 0.5 ** (rounds // every), 1e-6, 0, err_msg=every
    )


@settings(max_examples=25)  # each step of a schedule is a dispatch
@given(
  values=st.lists(st.integers(-5, 5), max_size=12),
  patience=st.integers(1, 3),
  higher=st.booleans(),
)
def test_a_plateau_counts_evaluations_without_a_better_value(
  values, patience, higher
):
  schedule = schedules.plateau("x", patience=patience, factor=0.5, floor=0.2)
  state = jax.device_get(schedule.init())
  best, bad, factor = -np.inf, 0, 1.0
  for value in values:
    state = engine_hparams.reacted(schedule, state, float(value), higher)
    good = value if higher else -value
    best, bad = (good, 0) if good > best else (best, bad + 1)
    if bad == patience:
      bad, factor = 0, max(factor * 0.5, 0.2)
    assert float(schedule.factor(jnp.int32(0), state)) == pytest.approx(factor)


def test_nan_is_no_better_value():
  schedule = schedules.plateau("x", factor=0.5)
  state = engine_hparams.reacted(schedule, schedule.init(), float("nan"), True)
  assert float(schedule.factor(jnp.int32(0), state)) == 0.5


def simulator_with(devices=1, **arguments) -> Simulator:
  data = blobs([5, 3, 6, 4, 7, 2])
  task = MODELS["lr"](data)
  algorithm = fedavg(task, sgd(0.3), sgd(1.0))
  made = make_simulator(
    task, algorithm, data, clients_per_round=4, devices=devices
  )
  fields = {
    f: getattr(made, f) for f in ("sampler", "batching", "runtime", "seed")
  }
  return Simulator(
    task=task, algorithm=algorithm, data=data, **fields, **arguments
  )


@pytest.mark.parametrize("devices", slow_but([2], [1, 2]))
def test_a_scheduled_run_is_one_with_other_rates_every_round(devices):
  plain = simulator_with(devices)
  planned = simulator_with(
    devices,
    schedules={
      "client.learning_rate": schedules.step(2, 0.5),
      "server.learning_rate": optax.linear_schedule(0.5, 1.0, 4),
    },
  )
  a, b = plain.init(), planned.init()
  rows: list[dict[str, float]] = []
  for r in range(6):
    hparams = hparams_of(
      plain,
      client={"learning_rate": 0.3 * 0.5 ** (r // 2)},
      server={"learning_rate": 0.5 + 0.5 * min(r / 4, 1)},
    )
    a = plain.dispatch(a, plain.plan(r, 1), hparams).state
    out = planned.dispatch(b, planned.plan(r, 1))
    b, rows = out.state, rows + out.rows
  ends = [flat(params_of(s, state)) for s, state in ((plain, a), (planned, b))]
  np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5, atol=1e-7)
  rates = [row["client/learning_rate"] for row in rows]
  np.testing.assert_allclose(rates, [0.3, 0.3, 0.15, 0.15, 0.075, 0.075], 1e-6)
  assert planned.compilations == 1


def test_several_rounds_in_a_dispatch_have_several_rates():
  planned = simulator_with(schedules={"client.learning_rate": lambda r: 0.5**r})
  many = Simulator(
    **{
      f: getattr(planned, f)
      for f in ("task", "algorithm", "data", "sampler", "batching", "schedules")
    }
  )
  out = next(iter(many.run(many.init(), 3)))
  assert len(out.rows) >= 1
  done = out.rows + [row for o in many.run(out.state, 3) for row in o.rows]
  np.testing.assert_allclose(
    [row["client/learning_rate"] for row in done], [0.3, 0.15, 0.075], 1e-6
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("stap(every=3)", r"e='stap' is unknown\. Did you mean 'step'"),
    ("step", r"step.* needs|step.*every"),
    ("step(3)", "without names"),
    ("step(**{})", "without names"),
    ("step(every=", "calls no schedule"),
    ("3", "no call"),
    ("step(every=open('x'))", "calls no schedule"),
    ("step(every=0)", r"step\(every=0\)': every=0 is out"),
    ("step(every=2, factor=0.0)", "factor=0.0 is out"),
    ("step(every=2, factor=1.5)", "factor=1.5 is out"),
    ("step(evry=2)", "does not take 'evry'"),
    ("multi_step(at=())", "holds no rounds"),
    ("multi_step(at=5)", "holds no rounds"),
    ("multi_step(at=(3, 5, 3))", "holds a round twice"),
    ("linear(rounds=0)", "rounds=0 is out"),
    ("cosine(rounds=5, floor=2.0)", "floor=2.0 is out"),
    ("ramp_keep_decay(ramp=0, keep=1, decay=1)", "ramp=0 is out"),
    ("ramp_keep_decay(ramp=1, keep=1, decay=1, floor=0.0)", "floor=0.0 is out"),
    ("plateau(factor=1.0)", "factor=1.0 is out"),
    ("plateau(patience=0)", "patience=0 is out"),
    ("plateau(metric=3)", "metric=3"),
  ],
)
def test_texts_that_call_no_schedule(text, message):
  with pytest.raises((TypeError, ValueError), match=message) as caught:
    schedules.parse("client.schedule", text)
  assert str(caught.value).startswith("client.schedule=")
  assert "\n" not in str(caught.value)


def test_of_a_hyper_parameter_that_is_not_there():
  with pytest.raises(
    validate.UnknownNameError, match=r"'client\.rate' .*client\.learning_rate"
  ):
    simulator_with(schedules={"client.rate": schedules.step(1)})
  with pytest.raises(TypeError, match="schedules=None is no dict"):
    simulator_with(schedules=None)
  with pytest.raises(TypeError, match=r"learning_rate'\]=0\.5 is no schedule"):
    simulator_with(schedules={"client.learning_rate": 0.5})


def test_of_a_metric_that_is_not_there_or_has_no_direction():
  with pytest.raises(ValueError, match="'test/loss' is not evaluated; the dat"):
    _ = simulator_with(
      schedules={"client.learning_rate": schedules.plateau()}
    ).checked

  data = blobs([5, 3], seed=1)
  seen = data.train

  def widened(task: Task) -> Task:
    def metrics(variables, examples):
      found = task.metrics(variables, examples)
      return {**found, "size": found["loss"]}

    return task._replace(metrics=metrics)

  data = dataclasses.replace(data, seen=seen)
  task = widened(MODELS["lr"](data))
  with pytest.raises(ValueError, match=r"of 'size' is better is not known.*Ta"):
    _ = Simulator(
      task=task,
      algorithm=fedavg(task, sgd(0.3), sgd(1.0)),
      data=data,
      sampler=make_simulator(
        task, fedavg(task, sgd(0.3), sgd(1.0)), data
      ).sampler,
      best_metrics=("seen/size/p10",),
    ).checked


def test_a_state_that_is_an_array_where_devices_share_a_model():
  halving = engine_hparams.Schedule(
    factor=lambda round_, state: state[0],
    init=lambda: jnp.ones(2),
    react=lambda state, value: state / 2,
    metric="seen/loss",
  )
  if jax.device_count() < 2:
    pytest.skip("needs 2 devices")
  data = blobs([5, 3])
  data = dataclasses.replace(data, seen=data.train)
  task = MODELS["lr"](data)
  simulator = Simulator(
    task=task,
    algorithm=fedavg(task, sgd(0.3), sgd(1.0)),
    data=data,
    sampler=sampling.uniform(2, 2),
    runtime=Runtime(lanes=1, devices=2, model_devices=2),
    schedules={"client.learning_rate": halving},
  )
  state, rates = simulator.init(), []
  for r in range(3):
    out = simulator.dispatch(state, simulator.plan(r, 1))
    rates.append(out.rows[0]["client/learning_rate"])
    state = simulator.react(out.state, {"seen/loss": 1.0})
  np.testing.assert_allclose(rates, [0.3, 0.15, 0.075], 1e-6)
