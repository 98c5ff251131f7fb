"""Clients that are left out: as if they had never been there."""

import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import build, default_config
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.sampling import poisson, power_of_choice, uniform, without
from problems import make_simulator, quadratic, quadratic_data, sgd, train


def test_others_take_part_when_they_did():
  for sampler in (uniform(9, 4), poisson(9, 2)):
    less = without(sampler, [2, 7], 9)
    for round_ in range(20):
      drawn = sampler.sample(5, round_)
      np.testing.assert_array_equal(
        less.sample(5, round_), [i for i in drawn if i not in (2, 7)]
      )
    assert less.sizes == sampler.sizes
    assert less.expected == pytest.approx(sampler.expected * 7 / 9)
    assert less.participation is None


def test_a_sampler_that_observes_would_wait_for_them():
  sampler = power_of_choice(6, 2, np.full(6, 5), candidates=6)
  assert sampler.init is not None
  assert sampler.observe is not None
  losses = sampler.init()
  for round_ in range(3):  # clients 1 and 4 never report
    ids = sampler.sample(0, round_, losses)
    present = ~np.isin(ids, [1, 4])
    loss = {"loss": np.ones(2, np.float32)}
    losses = sampler.observe(losses, round_, ids, present, loss)
  assert {*sampler.sample(0, 9, losses)} == {1, 4}  # and nobody trains
  with pytest.raises(ValueError, match="sampler.name observes"):
    without(sampler, [1, 4], 6)


def test_the_rest_is_trained_as_if_the_client_had_no_data():
  """One step of size 1 leads to the mean of the centres of who is there."""
  centres = np.array([[1.0, 0.0], [0.0, 4.0], [-6.0, 2.0], [3.0, 3.0]])
  data, task = quadratic_data(centres), quadratic(2)
  algorithm = fedavg(task, sgd(1.0), sgd(1.0))
  simulator = lambda left: make_simulator(
    task,
    algorithm,
    data,
    sampler=without(uniform(4, 2), left, 4),
    batching=LocalBatching(batch_size=1),
  )
  left = [0, 2]
  drawn = [uniform(4, 2).sample(0, r) for r in range(8)]
  assert any({*ids} == {0, 2} for ids in drawn)  # then nobody is there
  expected = np.zeros(2)
  run = simulator(left)
  for done, ids in enumerate(drawn, 1):
    there = [i for i in ids if i not in left]
    if there:
      expected = centres[there].mean(0)
    if done in (4, 8):
      found = algorithm.variables(train(run, done).server).params["w"]
      np.testing.assert_allclose(found, expected, atol=1e-6)


def config(**fields):
  made = default_config()
  made.data.num_clients = 6
  made.server.clients_per_round = 2
  made.server.leave_out = (1, 4)
  for field, value in fields.items():
    section, key = field.split("__")
    made[section][key] = value
  return made


def test_a_config_leaves_clients_out():
  simulator = build.build(config()).simulator
  drawn = [simulator.sampler.sample(0, r) for r in range(30)]
  assert {*np.concatenate(drawn)} == {0, 2, 3, 5}
  named = build.build(config(server__leave_out=("client 5",))).simulator
  ids = np.concatenate([named.sampler.sample(0, r) for r in range(30)])
  assert {*ids} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    ({"server__leave_out": (6,)}, "no client 6; clients have the numbers 0 to"),
    ({"server__leave_out": (-1,)}, "server.leave_out=-1"),
    ({"server__leave_out": (1.5,)}, "server.leave_out=1.5"),
    ({"server__leave_out": ("client 9",)}, "Did you mean 'client 5'"),
    ({"server__leave_out": (1, "client 1")}, "client 1 comes twice"),
    ({"server__leave_out": tuple(range(6))}, "leaves out all 6 clients"),
    ({"algorithm__name": "centralized"}, "pools the data of all clients"),
    ({"sampler__name": "power_of_choice"}, "sampler.name observes what"),
    (
      {
        "privacy__mechanism": "gaussian",
        "privacy__clip_norm": 1.0,
        "privacy__delta": 1e-3,
        "privacy__noise_multiplier": 2.0,
      },
      "privacy.mechanism='gaussian' counts on what sampler.name promises",
    ),
    (
      {
        "aggregator__name": "secure_sum",
        "aggregator__noise_multiplier": 1.0,
        "aggregator__clip": 1.0,
      },
      "does not promise how many",
    ),
  ],
)
def test_what_cannot_be_left_out_is_named(fields, told):
  with pytest.raises((TypeError, ValueError), match=told):
    build.build(config(**fields))
