"""Five algorithms of the literature, written against the contract alone.

They stand for the field: the contract is right when each fits into it in
under 60 lines and does what its paper says, here on quadratics, where every
client's optimum and every step is known in closed form.
"""

import pathlib

import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.engine.batching import LocalWork
from fedjax_sim.training.optimizers import optimizer
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  train,
)
from sketches.adaptive_clipping import adaptive_clipping
from sketches.ditto import ditto
from sketches.fedbuff import fedbuff
from sketches.mimelite import mimelite
from sketches.scaffold import scaffold

CENTRES = np.array([[0.0, 0.0], [1.0, 4.0], [5.0, -1.0], [-2.0, 2.0]])
CURVATURES = np.array([0.2, 1.0, 0.5, 2.0])
OPTIMUM = CURVATURES @ CENTRES / CURVATURES.sum()
STEPS = LocalWork(batch_size=1, steps=5)


def heterogeneous():
  return quadratic_data(CENTRES, CURVATURES)


@pytest.mark.parametrize(
  "name", ["adaptive_clipping", "ditto", "fedbuff", "mimelite", "scaffold"]
)
def test_a_sketch_is_short(name):
  path = pathlib.Path(__file__).parent / "sketches" / f"{name}.py"
  assert len(path.read_text().splitlines()) < 60


def test_scaffold_follows_the_papers_recursion():
  rate, rounds, local_steps = 0.1, 6, 5
  sampler = sampling.Sampler(
    sample=lambda seed, r: np.array([[0, 1], [2, 3], [1, 2]][r % 3]),
    sizes=(2,),
    expected=2.0,
  )
  simulator = make_simulator(
    quadratic(2),
    scaffold(quadratic(2), rate),
    heterogeneous(),
    work=STEPS,
    sampler=sampler,
  )
  state = train(simulator, rounds)

  x, c, c_k = np.zeros(2), np.zeros(2), np.zeros((4, 2))
  for r in range(rounds):
    dx, dc = [], []
    for k in sampler.sample(0, r):
      y = x.copy()
      for _ in range(local_steps):
        y -= rate * (CURVATURES[k] * (y - CENTRES[k]) - c_k[k] + c)
      new = c_k[k] - c + (x - y) / (local_steps * rate)
      dx.append(y - x)
      dc.append(new - c_k[k])
      c_k[k] = new
    x = x + np.mean(dx, axis=0)
    c = c + 2 / 4 * np.mean(dc, axis=0)
  np.testing.assert_allclose(params_of(simulator, state)["w"], x, atol=1e-5)
  np.testing.assert_allclose(state.clients[0]["w"][:4], c_k, atol=1e-5)


def test_scaffold_reaches_the_optimum_that_fedavg_misses():
  def distance(algorithm):
    simulator = make_simulator(
      quadratic(2), algorithm, heterogeneous(), work=STEPS
    )
    state = train(simulator, 200)
    return np.linalg.norm(params_of(simulator, state)["w"] - OPTIMUM)

  task = quadratic(2)
  sgd = optimizer("sgd", learning_rate=0.3)
  drifting = fedavg(
    task,
    sgd,
    optimizer("sgd", learning_rate=1.0),
    weighting="uniform",
  )
  assert distance(scaffold(task, 0.3)) < 1e-4
  assert distance(drifting) > 0.1


def test_mimelite_follows_the_papers_recursion():
  rate, beta, rounds = 0.1, 0.9, 5
  simulator = make_simulator(
    quadratic(2),
    mimelite(quadratic(2), rate, beta),
    quadratic_data(CENTRES, CURVATURES, copies=3),
    work=LocalWork(batch_size=2, epochs=2),  # batches of 2 and 1 equal examples
  )
  state = train(simulator, rounds)

  x, m = np.zeros(2), np.zeros(2)
  for _ in range(rounds):
    ys, gradients = [], []
    for a, b in zip(CURVATURES, CENTRES, strict=True):
      gradients.append(a * (x - b))
      y = x.copy()
      for _ in range(4):
        y -= rate * ((1 - beta) * a * (y - b) + beta * m)
      ys.append(y)
    m = beta * m + (1 - beta) * np.mean(gradients, axis=0)
    x = np.mean(ys, axis=0)
  np.testing.assert_allclose(params_of(simulator, state)["w"], x, atol=1e-5)
  np.testing.assert_allclose(state.server[1]["w"], m, atol=1e-5)


def test_ditto_keeps_personal_optima_between_own_and_global():
  strength = 0.5
  task = quadratic(2)
  simulator = make_simulator(
    task,
    ditto(task, 0.2, strength),
    quadratic_data(CENTRES),
    work=STEPS,
    lanes=2,
  )
  state = train(simulator, 200)
  mean = CENTRES.mean(axis=0)
  np.testing.assert_allclose(params_of(simulator, state)["w"], mean, atol=1e-4)
  personal = (CENTRES + strength * mean) / (1 + strength)
  np.testing.assert_allclose(state.clients[0]["w"][:4], personal, atol=1e-4)


def test_fedbuff_discounts_and_starts_from_the_version_held():
  rate, rounds = 0.1, 4
  stale = np.array([0, 1, 0, 1])
  sampler = sampling.uniform(4, 4)._replace(
    versions=lambda seed, r, ids: stale[ids]
  )
  simulator = make_simulator(
    quadratic(2),
    fedbuff(quadratic(2), rate),
    heterogeneous(),
    work=STEPS,
    sampler=sampler,
    lanes=2,
  )
  state = train(simulator, rounds)

  x = before = np.zeros(2)
  for _ in range(rounds):
    updates = []
    for k in range(4):
      start = before if stale[k] else x
      y = start.copy()
      for _ in range(5):
        y = y - rate * CURVATURES[k] * (y - CENTRES[k])
      updates.append((y - start) / np.sqrt(1 + stale[k]))
    before, x = x, x + np.mean(updates, axis=0)
  np.testing.assert_allclose(params_of(simulator, state)["w"], x, atol=1e-5)


def test_fedbuff_counts_one_version_as_downloaded():
  simulator = make_simulator(
    quadratic(2), fedbuff(quadratic(2), 0.1), heterogeneous()
  )
  assert simulator.bytes_per_client == (8, 12)  # two floats; and a weight up


def test_adaptive_clipping_finds_the_quantile_of_the_norms():
  norms = np.arange(1.0, 11.0)
  task = quadratic(1)
  # A server that stays where it is, so that the norms stay what they are.
  still = fedavg(
    task,
    optimizer("sgd", learning_rate=1.0),
    optimizer("sgd", learning_rate=0.0),
  )
  simulator = make_simulator(
    task,
    still,
    quadratic_data(norms[:, None]),
    work=LocalWork(batch_size=1),
    transforms=[adaptive_clipping(quantile=0.75, rate=0.05, initial=1.0)],
  )
  state = train(simulator, 200)
  assert 7.0 <= float(state.shared[0]) <= 8.1
  shared = float(state.shared[0])
  rows = simulator.dispatch(state, simulator.plan(200, 1)).rows
  expected = np.mean(norms <= shared)
  assert rows[0]["adaptive_clipping/below"] == pytest.approx(expected)
