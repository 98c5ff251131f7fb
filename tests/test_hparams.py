"""Hyper-parameters: a section for each part, and names in schedules."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from fedjax_sim import aggregators, transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import validate
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training import schedules
from problems import (
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

NAMES = ("task", "transforms", "aggregator", "algorithm")


def simulator_of(**more):
  """FedAvg whose update is times a number that has another part's name."""
  task = quadratic(2)
  loss = task.loss

  def scaled(variables, examples, key):
    found = loss(variables, examples, key)
    return found._replace(value=found.value * examples["scale"])

  task = task._replace(loss=scaled, hparams={"scale": 0.5})
  base = fedavg(task, sgd(1.0), sgd(1.0))

  def finish(client, carry):
    report = base.finish(client, carry)
    factor = math.prod(client.hparams[name]["factor"] for name in NAMES)
    update = jax.tree.map(lambda u: factor * u, report.update)
    return report._replace(update=update)

  algorithm = base._replace(
    finish=finish,
    hparams={
      **base.hparams,
      **{name: {"factor": 2.0, "scale": 1.0} for name in NAMES},
    },
  )
  plain = aggregators.sum_()
  aggregator = plain._replace(
    finish=lambda acc, weight, count, context: jax.tree.map(
      lambda x: context.hparams["factor"] * x, acc
    ),
    hparams={"factor": 3.0},
  )
  return make_simulator(
    task,
    algorithm,
    quadratic_data([[8.0, 4.0]]),
    batching=LocalBatching(batch_size=1),
    transforms=[transforms.clip(1e6)],
    aggregator=aggregator,
    **more,
  )


def test_an_algorithms_numbers_may_have_the_names_of_other_parts():
  simulator = simulator_of()
  assert set(simulator.hparams) == set(NAMES)
  # 0.5 of the task, 2 of the algorithm four times, 3 of the aggregator.
  found = params_of(simulator, train(simulator, 1))["w"]
  np.testing.assert_allclose(found, 0.5 * 2**4 * 3 * np.array([8.0, 4.0]))
  other = hparams_of(simulator, task={"factor": 1.0, "scale": 1.0})
  found = params_of(simulator, train(simulator, 1, other))["w"]
  np.testing.assert_allclose(found, 0.5 * 2**3 * 3 * np.array([8.0, 4.0]))


def test_schedules_name_a_part_or_the_algorithms_own_numbers():
  simulator = simulator_of()
  half = lambda round_: 0.5

  def names(*given):
    return set(schedules.checked(dict.fromkeys(given, half), simulator.hparams))

  assert names("client.learning_rate") == {"client.learning_rate"}
  assert names("algorithm.client.learning_rate") == {"client.learning_rate"}
  assert names("task.scale", "algorithm.task.scale") == {
    "task.scale",
    "algorithm.task.scale",
  }
  assert names("task.factor") == {"task.factor"}  # the task has no such number
  with pytest.raises(ValueError, match=r"'client.learning_rate' twice"):
    names("client.learning_rate", "algorithm.client.learning_rate")
  with pytest.raises(
    validate.UnknownNameError, match=r"client.learning_rat'.*transforms.clip"
  ):
    names("client.learning_rat")


@pytest.mark.parametrize(
  "name",
  slow_but(
    ["task.scale", "aggregator.factor"],
    ["task.scale", "algorithm.task.factor", "aggregator.factor", "task.factor"],
  ),
)
def test_a_schedule_changes_the_number_that_it_names(name):
  simulator = simulator_of()
  scheduled = dataclasses.replace(
    simulator, schedules={name: lambda round_: 0.25}
  )
  out = scheduled.dispatch(scheduled.init(), scheduled.plan(0, 1))
  found = params_of(scheduled, out.state)["w"]
  expected = 0.25 * params_of(simulator, train(simulator, 1))["w"]
  np.testing.assert_allclose(found, expected)
