"""Replay on the server against numpy."""

import dataclasses

import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.gossip import gossip
from fedjax_sim.algorithms.hierarchical import hierarchical
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.replay import replay
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

CENTRES = np.array([[1.0, 2.0], [-3.0, 4.0]])
OWN = np.array([[6.0, 0.0], [0.0, 8.0], [3.0, 1.0]], np.float32)


def simulator_of(*, own=True, devices=1, **options):
  task = quadratic(2)
  data = quadratic_data(CENTRES)
  if own:
    server = {"x": OWN, "a": np.ones(len(OWN), np.float32)}
    data = dataclasses.replace(data, server=server)
  algorithm = fedavg(task, sgd(0.5), sgd(1.0))
  return make_simulator(
    task,
    replay(algorithm, task, sgd(0.25), **options),
    data,
    batching=LocalBatching(batch_size=1),
    devices=devices,
  )


@pytest.mark.parametrize(
  ("steps", "devices"),
  slow_but([(1, 1), (4, 2)], [(n, m) for n in (1, 4) for m in (1, 2)]),
)
def test_the_server_steps_towards_its_own_examples(steps, devices):
  simulator = simulator_of(steps=steps, batch_size=3, devices=devices)
  state = train(simulator, 3)
  w = np.zeros(2)
  for _ in range(3):
    w = w + 0.5 * (CENTRES.mean(0) - w)
    for _ in range(steps):
      w = w + 0.25 * (OWN.mean(0) - w)
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, rtol=1e-5)
  assert simulator.compilations == 1


def test_every_step_draws_some_of_its_examples():
  """One step of size 2 leads to the mean of two of three examples."""
  simulator = simulator_of(steps=1, batch_size=2)
  state, seen = simulator.init(), set()
  before = np.zeros(2)
  for out in simulator.run(state, 20):
    after = params_of(simulator, out.state)["w"]
    w = before + 0.5 * (CENTRES.mean(0) - before)
    target = w + (after - w) / 0.25
    gaps = [
      np.abs(target - np.delete(OWN, i, axis=0).mean(0)).max() for i in range(3)
    ]
    assert min(gaps) < 1e-4
    seen.add(int(np.argmin(gaps)))
    before = after
  assert seen == {0, 1, 2}


def test_it_is_refused_where_it_makes_no_sense():
  with pytest.raises(ValueError, match=r"data\.server_clients"):
    simulator_of(own=False)
  with pytest.raises(ValueError, match=r"replay\.steps=0"):
    simulator_of(steps=0)
  task = quadratic(2)
  algorithm = fedavg(task, sgd(0.5), sgd(1.0))._replace(with_model=None)
  with pytest.raises(ValueError, match="no global model that can be replaced"):
    replay(algorithm, task, sgd(0.1))
  for several in (gossip(task, sgd(0.1), 4), hierarchical(task, sgd(0.1), 4)):
    with pytest.raises(ValueError, match="clients have several"):
      replay(several, task, sgd(0.1))


def test_the_tasks_numbers_are_there_for_the_servers_examples():
  """A loss that a number scales: twice the number, twice the step."""
  task = quadratic(2)
  plain = task.loss

  def loss(variables, examples, key):
    found = plain(variables, examples, key)
    return found._replace(value=found.value * examples["scale"])

  ends = []
  for scale in (0.1, 0.2):
    scaled = task._replace(loss=loss, hparams={"scale": scale})
    server = {"x": OWN[:1], "a": np.ones(1, np.float32)}
    data = dataclasses.replace(quadratic_data(OWN[:1]), server=server)
    simulator = make_simulator(
      scaled,
      replay(fedavg(scaled, sgd(0.0), sgd(1.0)), scaled, sgd(1.0), steps=1),
      data,
      batching=LocalBatching(batch_size=1),
    )
    ends.append(params_of(simulator, train(simulator, 1))["w"])
  np.testing.assert_allclose(ends, np.outer([0.1, 0.2], OWN[0]), rtol=1e-5)
