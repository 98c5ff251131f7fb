"""Metrics of rankings against scikit-learn's, and MIND's own formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from fedjax_sim.tasks.ranking import HIGHER_IS_BETTER, ranking_metrics

CANDIDATES = 14


def lists(seed, ties):
  """Lists of 2 to 14 candidates, with a click and a miss at least."""
  rng = np.random.default_rng(seed)
  for _ in range(20):
    n = int(rng.integers(2, CANDIDATES + 1))
    clicks = int(rng.integers(1, n))
    y = rng.permutation(np.arange(n) < clicks)
    yield rng.integers(0, 3, n) if ties else rng.normal(size=n), y


def padded(rows):
  out = np.zeros((len(rows), CANDIDATES), rows[0].dtype)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out


def metrics_of(pairs):
  scores = padded([np.asarray(s, np.float32) for s, _ in pairs])
  present = padded([np.ones(len(s), bool) for s, _ in pairs])
  scores = np.where(present, scores, 9)  # padding would come first
  relevant = padded([y for _, y in pairs])
  found = jax.jit(ranking_metrics)(scores, relevant, present)
  assert set(found) == set(HIGHER_IS_BETTER)
  assert all((m.weight == 1).all() for m in found.values())
  return {k: np.asarray(m.total) for k, m in found.items()}


@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn_agrees(ties):
  pairs = list(lists(0, ties))
  found = metrics_of(pairs)
  for i, (scores, y) in enumerate(pairs):
    assert found["auc"][i] == pytest.approx(roc_auc_score(y, scores), abs=1e-5)
    for most in (5, 10):
      expected = ndcg_score([y], [scores], k=most)
      assert found[f"ndcg{most}"][i] == pytest.approx(expected, abs=1e-5)


def test_reciprocal_ranks_are_means_over_clicks():
  """`sum(y / place) / sum(y)`, as MIND's evaluation has it."""
  pairs = list(lists(1, ties=False))
  found = metrics_of(pairs)
  for i, (scores, y) in enumerate(pairs):
    order = np.argsort(-scores)
    expected = np.sum(y[order] / np.arange(1, len(y) + 1)) / y.sum()
    assert found["mrr"][i] == pytest.approx(expected, abs=1e-5)
    assert found["accuracy"][i] == y[order[0]]


def test_equal_scores_share_their_places():
  """No order of the candidates counts: each metric is its mean over all."""
  y = np.array([1, 0, 0, 0, 1], bool)
  found = metrics_of([(np.array([2, 1, 1, 1, 1]), y)])
  rest = np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5])
  assert found["mrr"][0] == pytest.approx((1 + rest) / 2)
  assert found["auc"][0] == pytest.approx((3 + 3 * 0.5) / 6)
  same = metrics_of([(np.zeros(5), y)])
  assert same["accuracy"][0] == pytest.approx(2 / 5)


def test_lists_without_a_click_or_with_nothing_else_do_not_count():
  y = jnp.array([[0, 0, 0], [1, 1, 0], [1, 0, 0]], bool)
  present = jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
  found = ranking_metrics(jnp.ones((3, 3)), y, present)
  for metric in found.values():
    assert metric.weight.tolist() == metric.total.tolist() == [0, 0, 0]


def test_scores_that_are_not_finite():
  """NaN has no place, so no metric; what is infinite is before the others."""
  y = np.array([1, 0, 0], bool)
  for broken in ([np.nan] * 3, [np.nan, 1, 2], [2, np.nan, 1]):
    found = metrics_of([(np.array(broken), y)])
    assert all(np.isnan(value[0]) for value in found.values())
  found = metrics_of([(np.full(3, np.inf), y)])
  assert found["auc"][0] == pytest.approx(0.5)
  assert found["mrr"][0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
  found = metrics_of([(np.array([-np.inf, np.inf, 0]), y)])
  assert found["mrr"][0] == pytest.approx(1 / 3)
