"""Models, data and arguments that do not fit are refused before any compute."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fedjax_sim import aggregators, sampling, simulate
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Aggregator,
  Loss,
  Metric,
  Requirements,
  Task,
  Variables,
)
from fedjax_sim.data import FederatedData, make_dataset
from fedjax_sim.distributed import memory
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.simulation import arguments
from fedjax_sim.simulation.dispatch import DivergedError
from fedjax_sim.simulation.preflight import ModelError
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.tasks import function_task, nnx_task
from problems import MODELS, blobs, make_simulator, sgd
from tiers import slow_but

DATA = blobs([5, 8, 6])


def begin(task, **arguments):
  return simulate(
    task=task,
    algorithm=fedavg(task, sgd(0.1), sgd(1.0)),
    data=DATA,
    rounds=1,
    clients_per_round=2,
    **arguments,
  )


def linear(loss):
  return function_task(lambda key: {"w": jnp.zeros(6)}, loss)


@pytest.mark.parametrize(
  ("loss", "message"),
  [
    (lambda p, e: jnp.mean(e["x"] @ p["w"]), r"value has shape \(\)"),
    (lambda p, e: (e["x"] @ p["w"])[:, None], r"value has shape \(8, 1\)"),
    (lambda p, e: e["y"], "value has dtype int32"),
    (lambda p, e: e["x"] @ p["w"][:5], "does not fit the data: dot_general"),
    (lambda p, e: e["z"], "does not fit the data: 'z'"),
  ],
)
def test_losses_that_do_not_fit(loss, message):
  with pytest.raises(ModelError, match=message):
    begin(linear(loss))


def sized(task, data, batch, evaluated):
  """A simulator with batches of these sizes."""
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    data,
    batching=LocalBatching(batch_size=batch),
  )
  runtime = dataclasses.replace(simulator.runtime, eval_batch_size=evaluated)
  return dataclasses.replace(simulator, runtime=runtime)


def grouped(groups):
  """A loss of the batch cut into so many groups, as ghost batches are."""

  def loss(params, examples):
    x = examples["x"].reshape(groups, -1, 6)
    return ((x @ params["w"]) ** 2).reshape(-1)

  return linear(loss)


@pytest.mark.parametrize(
  ("groups", "batch", "evaluated"),
  [(2, 3, 4), (4, 6, 4), (4, 4, 3), (4, 32, 3)],  # at most 8, the largest
)
def test_batches_of_the_runs_size_that_do_not_fit(groups, batch, evaluated):
  data = dataclasses.replace(DATA, test=DATA.train.examples)
  with pytest.raises(ModelError, match="does not fit the data: cannot reshape"):
    sized(grouped(groups), data, batch, evaluated).init()


@pytest.mark.parametrize(
  ("part", "batch", "evaluated"),
  slow_but(
    [("test", 32, 4), ("seen", 8, 256)],
    [
      ("seen", 4, 4),
      ("unseen", 8, 4),
      ("test", 32, 4),
      ("unseen", 4, 8),
      ("seen", 8, 256),
    ],
  ),
)
def test_batches_that_fit_at_the_runs_size_only(part, batch, evaluated):
  whole = DATA.train.select([1])
  held: Any = {"test": whole.examples, "unseen": whole, "seen": DATA.train}[
    part
  ]
  data = dataclasses.replace(DATA, **{part: held})
  simulator = sized(grouped(4), data, batch, evaluated)
  state = simulator.init()
  assert f"{part}/loss" in simulator.evaluate(state)
  assert simulator.dispatch(state, simulator.plan(0, 1)).failure is None


@pytest.mark.parametrize("part", ["total", "weight"])
def test_metrics_of_another_shape(part):
  def metrics(variables, examples):
    ones = jnp.ones(len(examples["y"]))
    return {"hit": Metric(ones, ones)._replace(**{part: jnp.ones(())})}

  def loss(variables, examples, key):
    value = examples["x"] @ variables.params
    return Loss(value, jnp.ones_like(value))

  task = Task(lambda key: Variables(jnp.zeros(6)), loss, metrics)
  with pytest.raises(ModelError, match=rf"{part} of 'hit' has shape \(\)"):
    begin(task)


def test_a_model_that_no_device_can_hold(monkeypatch):
  monkeypatch.setattr(memory, "memory_limit", lambda device: 10)
  with pytest.raises(ModelError, match=r"take 0 MB; .* Make the model smaller"):
    begin(MODELS["lr"](DATA))


def test_a_model_with_too_few_outputs_does_not_train_in_silence():
  task = logistic_regression(DATA.example_shape, DATA.num_classes - 1)
  run = begin(task, batching=LocalBatching(batch_size=8))
  with pytest.raises(DivergedError, match="Round 1: .*as many outputs"):
    list(run)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("aggregator", "median", "aggregator is a str; .*weighted_mean"),
    ("aggregator", aggregators.median, "aggregator is median;"),
    ("sampler", "uniform", "sampler is a str; .*sampling.uniform"),
    ("batching", (8, 1), "batching is a tuple; .*LocalBatching"),
    ("transforms", "clip", "transforms is a str; .*clip"),
    ("transforms", ["clip"], r"transforms\[0\] is a str; .*clip"),
    ("runtime", {"lanes": 1}, "runtime is a dict; .*Runtime"),
    ("data", DATA.train, "data is a FederatedData; .*make_dataset"),
    ("algorithm", fedavg, "algorithm is fedavg; .*fedavg"),
    ("task", logistic_regression, "task is logistic_regression; "),
  ],
)
def test_arguments_of_another_kind(field, value, message):
  task = MODELS["lr"](DATA)
  arguments = {
    "task": task,
    "algorithm": fedavg(task, sgd(0.1), sgd(1.0)),
    "data": DATA,
    "sampler": sampling.uniform(3, 2),
  }
  with pytest.raises(TypeError, match=message):
    simulate(rounds=1, clients_per_round=2, **{**arguments, field: value})


def test_an_optimiser_of_optax_is_named():
  task = MODELS["lr"](DATA)
  with pytest.raises(TypeError, match="client_optimizer is a Gradient"):
    fedavg(task, optax.sgd(0.1), sgd(1.0))
  with pytest.raises(TypeError, match="server_optimizer is a str; .*optimizer"):
    fedavg(task, sgd(0.1), "adam")  # type: ignore[arg-type]


def test_a_module_in_the_place_of_its_maker():
  with pytest.raises(TypeError, match=r"lambda rngs: Linear\(..., rngs=rngs"):
    nnx_task(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


def test_data_without_an_input():
  clients = FederatedData.from_clients({7: {"pixels": np.ones((3, 2))}})
  assert clients.client_name(0) == "7"
  with pytest.raises(ValueError, match=r"fields \['pixels'\]; call .* 'x'"):
    make_dataset("mine", clients, num_classes=0)


def test_hyper_parameters_of_the_algorithm_alone():
  task = MODELS["lr"](DATA)
  algorithm = fedavg(task, sgd(0.1), sgd(1.0))
  simulator = make_simulator(task, algorithm, DATA)
  own = {"algorithm": algorithm.hparams}
  state = simulator.init(own)
  out = simulator.dispatch(state, simulator.plan(0, 1), own)
  assert out.failure is None
  with pytest.raises(ValueError, match="does not have the structure"):
    simulator.init({"algorithm": {**algorithm.hparams, "mu": 1.0}})
  with pytest.raises(ValueError, match=r"'client'\] is no section .*own numb"):
    simulator.init(algorithm.hparams)


def test_parts_that_do_not_go_with_each_other():
  algorithm = fedavg(linear(lambda p, e: e["x"] @ p["w"]), sgd(0.1), sgd(1.0))
  mean, stack = aggregators.weighted_mean(), aggregators.stack()
  few = (algorithm.passes[0]._replace(split="labelled"),)
  arguments.check_parts(algorithm, mean, DATA, Runtime())
  arguments.check_parts(
    algorithm._replace(requirements=Requirements(all_updates=True)),
    stack,
    DATA,
    Runtime(),
  )
  needs = lambda **fields: {"requirements": Requirements(**fields)}
  cases: list[tuple[dict[str, Any], Aggregator, Runtime, str]] = [
    ({"passes": few}, mean, Runtime(), "walks over the split 'labelled'"),
    ({}, stack, Runtime(), "leaves the joining of updates"),
    (
      needs(all_updates=True),
      mean,
      Runtime(),
      "joins the clients' updates .*name='stack'",
    ),
    (
      needs(weighted_mean=True),
      aggregators.mean(),
      Runtime(),
      "'weighted_mean'",
    ),
    (needs(server_data=True), mean, Runtime(), r"data\.server_clients"),
    (
      needs(all_updates=True),
      stack,
      Runtime(deterministic_reduction=2, lanes=1),
      "deterministic_reduction=2: aggregator",
    ),
  ]
  for changes, aggregator, runtime, message in cases:
    with pytest.raises(ValueError, match=message):
      arguments.check_parts(
        algorithm._replace(**changes), aggregator, DATA, runtime
      )
