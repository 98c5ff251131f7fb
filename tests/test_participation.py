"""Stratified and importance sampling: who is drawn how often, and the mean."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.feddyn import feddyn
from fedjax_sim.algorithms.ifca import ifca
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.core import Sampler
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.sampling import (
  importance,
  poisson,
  stratified,
  systematic,
  uniform,
)
from problems import (
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)


@given(
  hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0.01, 100)),
  st.data(),
)
def test_inclusion_probabilities(scores, data):
  size = data.draw(st.integers(1, len(scores)))
  found = systematic.inclusion(scores, size)
  assert found.sum() == pytest.approx(size)
  assert (found <= 1 + 1e-12).all()
  below = found < 1 - 1e-9
  if below.any():  # those are in proportion, and the others would be above 1
    ratio = found[below] / scores[below]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    assert (scores[~below] * ratio[0] >= 1 - 1e-6).all()


def test_inclusion_where_rounding_takes_all_above_one():
  """The sum of the scores is rounded down, and 6 times each over it is > 1."""
  found = systematic.inclusion(np.array([0.1] * 6 + [0.0]), 6)
  np.testing.assert_array_equal(found, [1.0] * 6 + [0.0])


def test_systematic_draws_hit_as_often_as_they_should():
  scores = np.array([8.0, 1.0, 3.0, 0.5, 2.0, 1.5])
  probabilities = systematic.inclusion(scores, 3)
  rng = np.random.default_rng(0)
  counts = np.zeros(6)
  for _ in range(4000):
    ids = systematic.draw(rng, probabilities, rng.permutation(6))
    assert len(np.unique(ids)) == 3
    counts[ids] += 1
  error = 4 * np.sqrt(probabilities * (1 - probabilities) / 4000)
  assert (np.abs(counts / 4000 - probabilities) <= error + 1e-12).all()


def labels_of(clients, classes=3):
  """Client i has label i modulo the classes, and a few of the next."""
  counts = np.zeros((clients, classes), int)
  own = np.arange(clients) % classes
  counts[np.arange(clients), own] = 20
  counts[np.arange(clients), (own + 1) % classes] = np.arange(clients) % 4
  return counts, own


def test_every_stratum_has_its_share():
  counts, own = labels_of(30)
  sampler = stratified(30, 7, counts, counts.sum(1), strata=3)
  drawn = np.zeros(30)
  for r in range(600):
    ids = sampler.sample(1, r)
    assert len(np.unique(ids)) == 7
    of_stratum = np.bincount(own[ids], minlength=3)
    assert set(of_stratum) <= {2, 3}  # 7 / 3, rounded down or up
    drawn[ids] += 1
  error = 4 * np.sqrt(7 / 30 * (1 - 7 / 30) / 600)
  assert np.abs(drawn / 600 - 7 / 30).max() < error


def test_strata_by_size():
  sizes = np.arange(40) ** 2 + 1
  sampler = stratified(40, 8, np.zeros((40, 0)), sizes, by="sizes", strata=4)
  for r in range(20):
    of_stratum = np.bincount(sampler.sample(0, r) // 10, minlength=4)
    assert (of_stratum == 2).all()


def test_strata_need_labels():
  with pytest.raises(ValueError, match="take by='sizes'"):
    stratified(5, 2, np.zeros((5, 0)), np.ones(5))


NORMS = np.array([4.0, 1.0, 0.5, 0.25, 0.25, 2.0], np.float32)
SIZES = np.array([1, 2, 4, 8, 4, 1])


def test_weighted_sums_of_importance_samples_have_no_bias():
  """Horvitz-Thompson: sums of what is drawn, over its probability."""
  sampler = importance(6, 3, SIZES)
  assert sampler.weights is not None
  values = np.array([3.0, -1.0, 2.0, 5.0, 0.5, -4.0])
  sums = []
  for r in range(4000):
    ids = sampler.sample(0, r, NORMS)
    factors = sampler.weights(0, r, ids, NORMS)
    assert (factors <= 1 / 0.1 + 1e-9).all()
    sums.append(6 / 3 * factors @ values[ids])
  error = 4 * np.std(sums) / np.sqrt(len(sums))
  assert abs(np.mean(sums) - values.sum()) < error


def test_probabilities_go_with_examples_times_norms():
  sampler = importance(6, 3, SIZES, uniform_share=0.2)
  assert sampler.weights is not None
  found = sampler.weights(0, 0, np.arange(6), NORMS)
  likely = 3 * np.array([4, 2, 2, 2, 1, 2]) / 13  # none is above 1
  np.testing.assert_allclose(found, 0.5 / (0.8 * likely + 0.2 * 0.5))


def test_importance_is_uniform_where_all_are_alike():
  sampler = importance(6, 3, np.full(6, 5))
  assert sampler.weights is not None
  ids = np.array([0, 2, 5])
  for norms in (np.full(6, -1.0), np.full(6, 2.0), np.zeros(6)):
    np.testing.assert_allclose(sampler.weights(0, 0, ids, norms), 1)


@pytest.mark.parametrize(
  "make", [scaffold, feddyn, lambda *parts: ifca(*parts, clusters=2)]
)
def test_factors_are_not_for_servers_that_follow_what_clients_keep(make):
  """SCAFFOLD's c would be no mean of the c_i any more."""
  task = quadratic(1)
  with pytest.raises(ValueError, match=r"Sampler\.weights.*algorithm\.name"):
    make_simulator(
      task,
      make(task, sgd(0.1), sgd(1.0)),
      quadratic_data([[0.0], [1.0]]),
      sampler=importance(2, 1, np.ones(2)),
    )


def test_norms_are_observed_and_weights_reach_the_mean():
  """The mean of a round is that by size over probability."""
  centres = np.array([[1.0], [2.0], [-6.0], [0.5]])
  task = quadratic(1)
  sampler = importance(4, 2, np.ones(4), uniform_share=0.5)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(1.0), sgd(1.0)),
    quadratic_data(centres),
    sampler=sampler,
    batching=LocalBatching(batch_size=1),
    lanes=2,
  )
  state = simulator.init()
  x, norms = 0.0, np.full(4, -1.0)
  for r, out in enumerate(simulator.run(state, 5)):
    state = out.state
    ids = sampler.sample(0, r, norms)
    assert sampler.weights is not None
    factors = sampler.weights(0, r, ids, norms)
    norms[ids] = np.abs(centres[ids, 0] - x)
    x = np.average(centres[ids, 0], weights=factors)
    np.testing.assert_allclose(state.sampler, norms, rtol=1e-5)
    assert flat(params_of(simulator, state)) == pytest.approx(x, rel=1e-5)


def test_private_runs_refuse_weights():
  task = quadratic(1)
  private = with_central_dp(
    fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform"),
    CentralDPConfig(clip_norm=1.0, noise_multiplier=1.0, denominator=2.0),
  )
  weighted = poisson(4, 2)._replace(
    weights=lambda seed, round_, ids: np.ones(len(ids))
  )
  with pytest.raises(ValueError, match=r"Sampler\.weights"):
    make_simulator(
      task, private, quadratic_data(np.ones((4, 1))), sampler=weighted
    )


def test_weights_that_are_none_are_refused():
  plain = uniform(4, 2)
  wrong = plain._replace(weights=lambda seed, round_, ids: np.zeros(2))
  task = quadratic(1)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(1.0), sgd(1.0)),
    quadratic_data(np.ones((4, 1))),
    sampler=wrong,
  )
  with pytest.raises(ValueError, match="give each client of the cohort"):
    train(simulator, 1)
  assert isinstance(wrong, Sampler)
