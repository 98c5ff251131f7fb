"""The round as a Python loop agrees with the compiled one, and names errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_sim import aggregators, sampling, simulate, transforms
from fedjax_sim.algorithms.ditto import ditto
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.sampling import power_of_choice
from fedjax_sim.simulation.reference import StageError
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.tasks import function_task
from fedjax_sim.training.optimizers import optimizer
from problems import MODELS, blobs, make_simulator, sgd
from tiers import slow_but

SIZES = [3, 9, 1, 7, 5]
DATA = blobs(SIZES, seed=5)
TASK = MODELS["lr"](DATA)
PLAIN = fedavg(TASK, sgd(0.3), sgd(1.0))


def of(algorithm=PLAIN, rounds=2, **changes):
  """A simulator with three of five clients a round, in two lanes."""
  arguments = {"clients_per_round": 3, "lanes": 2, **changes}
  return make_simulator(
    TASK, algorithm, DATA, rounds_per_dispatch=rounds, **arguments
  )


def both(simulator, rounds=2):
  """What the compiled rounds and the reference leave: states and rows."""
  ends = []
  for debug in (False, True):
    one = dataclasses.replace(simulator, debug=debug)
    state, rows, log = one.init(), [], []
    for out in one.run(state, rounds):
      state = out.state
      rows.extend(out.rows)
      log.append(out.client_log)
    assert bool(one.compiler.compiled) != debug
    ends.append((jax.device_get(state), rows, log))
  return ends


CASES = {
  "fedavg": lambda: of(),
  "two devices": lambda: of(devices=2),
  "a client's state": lambda: of(
    scaffold(TASK, sgd(0.3), sgd(1.0)), batching=None
  ),
  "a personal model": lambda: of(ditto(TASK, sgd(0.3), sgd(1.0))),
  "transforms": lambda: of(
    transforms=[
      transforms.clip(0.05),
      transforms.error_feedback(transforms.quantize(0.5, 4)),
      transforms.gaussian(0.01),
      transforms.lift("trace", optimizer(optax.trace, decay=0.5)),
    ]
  ),
  "private": lambda: of(
    with_central_dp(
      fedavg(TASK, sgd(0.3), sgd(1.0), weighting="uniform"),
      CentralDPConfig(clip_norm=0.1, noise_multiplier=1.0, denominator=3.0),
    ),
    sampler=sampling.poisson(len(SIZES), 2),
  ),
  "tokens": lambda: of(batching=LocalBatching(batch_size=2, max_tokens=5)),
  "median": lambda: of(aggregator=aggregators.median()),
  "an observer": lambda: of(
    sampler=power_of_choice(len(SIZES), 2, np.array(SIZES))
  ),
}


QUICK = ["private", "median", "a client's state"]


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_the_reference_agrees_with_the_compiled_round(name):
  (state, rows, _), (other, same, _) = both(CASES[name]())
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert [row.keys() for row in rows] == [row.keys() for row in same]
  for row, one in zip(rows, same, strict=True):
    assert row == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_the_client_log_agrees():
  (_, _, logs), (_, _, same) = both(dataclasses.replace(of(), log_clients=True))
  for log, other in zip(logs, same, strict=True):
    assert log.keys() == other.keys()
    for column in log:
      np.testing.assert_allclose(
        log[column], other[column], rtol=1e-4, atol=1e-6
      )


def test_examples_that_are_sent_agree():
  runtime = Runtime(lanes=2, devices=1, residency="host", donate=False)
  simulator = dataclasses.replace(of(), runtime=runtime)
  (state, rows, _), (other, same, _) = both(simulator)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert rows[-1] == pytest.approx(same[-1], rel=1e-5)


def test_a_cohort_without_anybody():
  nobody = sampling.Sampler(
    sample=lambda seed, round_: np.zeros(0, np.int64), sizes=(2,), expected=1
  )
  (state, _, _), (other, rows, _) = both(of(sampler=nobody), 1)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)
  assert rows[0]["clients"] == 0


# --- errors -------------------------------------------------------------------


def fails(client=None, step=None):
  """A function that raises an error for one client, once it has values."""

  def check(value, ident=None):
    if isinstance(value, jax.core.Tracer):
      return value
    if client is None or int(ident) == client:
      raise ArithmeticError("seven")
    return value

  return check


def with_step(at, client):
  """FedAvg whose step `at` of a client raises an error."""
  walked = PLAIN.passes[0]
  count = {"steps": 0}

  def start(client_, *carries):
    count["steps"] = 0
    return walked.start(client_, *carries)

  def step(client_, carry, batch, key):
    count["steps"] += 1
    if count["steps"] == at:
      fails(client)(client_.id, client_.id)
    return walked.step(client_, carry, batch, key)

  return PLAIN._replace(passes=(walked._replace(start=start, step=step),))


def on(name, place, client=None):
  """FedAvg whose function `name` raises an error.

  Args:
    name: a field of `Algorithm`.
    place: which argument is looked at for values.
    client: for which client; None for the server.
  """
  inner, check = getattr(PLAIN, name), fails(client)

  def call(*args):
    seen = jax.tree.leaves(args[place])[0]
    check(seen, args[0].id if client is not None else None)
    return inner(*args)

  changed: dict[str, Any] = {name: call}
  return PLAIN._replace(**changed)


def failing_transform():
  def apply(update, shared, state, hparams, key):
    fails()(jax.tree.leaves(update)[0])
    return transforms.clip(1.0).apply(update, shared, state, hparams, key)

  return transforms.clip(1.0)._replace(apply=apply)


def failing_aggregator():
  base = aggregators.weighted_mean()

  def add(acc, updates, weights, present, context):
    fails()(weights)
    return base.add(acc, updates, weights, present, context)

  return base._replace(add=add)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"algorithm": on("broadcast", 0)}, "Round 1, broadcast: Arith"),
    ({"algorithm": with_step(2, 3)}, "Round 1, client 3, step 2: Arith.*seven"),
    ({"algorithm": on("finish", 1, 4)}, "Round 1, client 4, finish: Arith"),
    (
      {"algorithm": on("postprocess_report", 1, 2)},
      "Round 1, client 2, postprocess: Arith",
    ),
    ({"transforms": [failing_transform()]}, r"client \d, transform clip: Ar"),
    ({"aggregator": failing_aggregator()}, r"Round 1, client \d, add: Arith"),
    ({"algorithm": on("apply", 0)}, "Round 1, apply: Arith"),
  ],
  ids=lambda x: None if isinstance(x, dict) else x.split(":")[0],
)
def test_an_error_names_stage_and_client(changes, message):
  simulator = of(clients_per_round=len(SIZES), **changes)
  simulator = dataclasses.replace(simulator, debug=True)
  with pytest.raises(StageError, match=message) as caught:
    next(simulator.run(simulator.init(), 1))
  assert isinstance(caught.value.__cause__, ArithmeticError)


def test_a_model_has_values_though_it_has_a_fast_form():
  seen = []

  def loss(params, examples):
    logits = examples["x"] @ params["kernel"]  # narrow
    value = getattr(logits, "primal", logits)  # under a gradient
    if not isinstance(value, jax.core.Tracer):
      seen.append(np.asarray(value))
    return jnp.sum(logits**2, axis=-1)

  task = function_task(
    lambda key: {"kernel": jnp.ones((6, 3))}, loss, fast_layers=True
  )
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), blobs([4]))
  simulator = dataclasses.replace(simulator, debug=True)
  next(simulator.run(simulator.init(), 1))
  (logits,) = seen  # of one step
  sums = simulator.data.train.examples["x"].sum(axis=-1)
  np.testing.assert_allclose(np.sort(logits[:, 0]), np.sort(sums), rtol=1e-5)


def test_simulate_debugs():
  seen = []
  base = PLAIN.finish

  def finish(client, carry):
    if not isinstance(client.id, jax.core.Tracer):
      seen.append((int(client.round), int(client.id)))
    return base(client, carry)

  rows = [
    row
    for _, row in simulate(
      task=TASK,
      algorithm=PLAIN._replace(finish=finish),
      data=DATA,
      rounds=2,
      clients_per_round=2,
      debug=True,
    )
  ]
  assert [row["clients"] for row in rows] == [2, 2]
  assert [round_ for round_, _ in seen] == [0, 0, 1, 1]
  with pytest.raises(TypeError, match="debug"):
    dataclasses.replace(of(), debug=1)
