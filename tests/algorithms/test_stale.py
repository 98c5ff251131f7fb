"""Stale updates against a loop over clients in numpy."""

import jax
import numpy as np
import pytest

from fedjax_sim import aggregators
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Purpose, key_for
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.stale import stale
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

CLIENTS, ROUNDS, RATE = 12, 8, 0.25
CENTRES = np.random.default_rng(0).normal(size=(CLIENTS, 3))
SIZES = 1 + np.arange(CLIENTS) % 3


def simulator_of(probability, lanes=1, devices=1, aggregator=None):
  task = quadratic(3)
  base = fedavg(task, sgd(RATE), sgd(1.0))

  def finish(client, carry):  # weights that differ
    report = base.finish(client, carry)
    return report._replace(weight=1.0 + client.id % 3)

  return make_simulator(
    task,
    stale(base._replace(finish=finish), probability),
    quadratic_data(CENTRES),
    batching=LocalBatching(batch_size=1),
    lanes=lanes,
    devices=devices,
    aggregator=aggregator,
  )


def late_in(round_, probability):
  """Which clients are late, from the same keys."""
  keys = [
    jax.random.fold_in(key_for(0, Purpose.CLIENT, round_, i), 0x6C617465)
    for i in range(CLIENTS)
  ]
  return np.array([float(jax.random.uniform(k)) < probability for k in keys])


def by_hand(probability):
  """The model after every round, and the weight that was still on its way."""
  w = np.zeros(3)
  held: list[tuple[np.integer, np.ndarray]] = []
  models, on_its_way = [], []
  for round_ in range(ROUNDS):
    late = late_in(round_, probability)
    sent = [(s, RATE * (c - w)) for s, c in zip(SIZES, CENTRES, strict=True)]
    now = held + [
      x for x, is_late in zip(sent, late, strict=True) if not is_late
    ]
    held = [x for x, is_late in zip(sent, late, strict=True) if is_late]
    if now:
      weight = sum(s for s, _ in now)
      w = w + sum(s * u for s, u in now) / weight
    models.append(w)
    on_its_way.append(sum(s for s, _ in held))
  return models, on_its_way


@pytest.mark.parametrize(
  ("probability", "lanes", "devices"),
  slow_but(
    [(0.3, 3, 2), (1.0, 1, 1)],
    [(p, *n) for p in (0.0, 0.3, 0.95, 1.0) for n in ((1, 1), (3, 2))],
  ),
)
def test_what_is_late_is_joined_a_round_later(probability, lanes, devices):
  simulator = simulator_of(probability, lanes, devices)
  models, on_its_way = by_hand(probability)
  state = simulator.init()
  for round_, out in enumerate(simulator.run(state, ROUNDS)):
    held = float(out.state.server.late.weight)
    np.testing.assert_allclose(
      params_of(simulator, out.state)["w"], models[round_], atol=1e-5
    )
    np.testing.assert_allclose(held, on_its_way[round_], rtol=1e-5)
  assert simulator.compilations == 1
  if probability == 0.3:
    assert max(on_its_way) > 0
    assert max(on_its_way) < SIZES.sum()


@pytest.mark.parametrize(
  ("beta", "reference", "shift", "chances"),
  [
    (2.0, None, 0.0, (0.5, 0.5, 1.0, 0.0, 0.3)),
    (1.0, 96.0, 8.0, (0.5, 0.5)),  # whose exponential no float32 holds
  ],
)
def test_late_clients_of_dga_count_as_their_statistic_says(
  beta, reference, shift, chances
):
  """DGA's weights are told against a reference, which may move every round."""
  task, centres = quadratic(3), CENTRES + shift
  made = dga(task, sgd(RATE), sgd(1.0), beta=beta, reference=reference)
  algorithm = stale(made, 0.5)
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(centres),
    batching=LocalBatching(batch_size=1),
  )
  state, w = simulator.init(), np.zeros(3)
  held: list[tuple[np.floating, np.ndarray]] = []
  for round_, probability in enumerate(chances):
    hparams = hparams_of(simulator, stale_probability=probability)
    state = simulator.dispatch(state, simulator.plan(round_, 1), hparams).state
    late = late_in(round_, probability)
    losses = 0.5 * np.sum((centres - w) ** 2, axis=1)
    sent = list(zip(np.exp(-beta * losses), RATE * (centres - w), strict=True))
    now = held + [
      x for x, is_late in zip(sent, late, strict=True) if not is_late
    ]
    held = [x for x, is_late in zip(sent, late, strict=True) if is_late]
    if now:
      w = w + sum(s * u for s, u in now) / sum(s for s, _ in now)
    np.testing.assert_allclose(
      params_of(simulator, state)["w"], w, rtol=1e-4, atol=1e-5
    )


def test_the_probability_is_a_hyper_parameter():
  simulator = simulator_of(0.0)
  hparams = hparams_of(simulator, stale_probability=1.0)
  state = train(simulator, 1, hparams)
  np.testing.assert_array_equal(params_of(simulator, state)["w"], np.zeros(3))
  assert float(state.server.late.weight) == SIZES.sum()


def test_it_is_refused_where_it_makes_no_sense():
  with pytest.raises(ValueError, match=r"server\.stale_probability=1\.5"):
    simulator_of(1.5)
  with pytest.raises(ValueError, match=r"set aggregator.name='weighted_mean'"):
    simulator_of(0.5, aggregator=aggregators.mean())
