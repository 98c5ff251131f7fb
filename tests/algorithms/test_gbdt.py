"""Federated boosting: numpy's trees on pooled data, and scikit-learn's AUC."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.ensemble
import sklearn.metrics

from fedjax_sim.algorithms.gbdt import gbdt
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.gbdt import gbdt as trees_task
from fedjax_sim.training.trees import best_splits
from problems import make_simulator

BINS, DEPTH, TREES = 8, 3, 3
L2, GAIN, CHILD, RATE = 0.7, 0.05, 0.4, 0.5
SIZES = [3, 50, 8, 1, 40, 6]
RNG = np.random.default_rng(0)
X = RNG.uniform(-1.1, 1.1, size=(sum(SIZES), 4)).astype(np.float32)
MARGIN = X[:, 0] * X[:, 1] * 4 + X[:, 2] - 0.3 + 0.3 * RNG.normal(size=len(X))


def simulator_of(x, y, sizes, task, algorithm, **others):
  data = FederatedDataset(
    name="own",
    train=FederatedData(
      examples={"x": x, "y": y}, offsets=np.cumsum([0, *sizes])
    ),
    num_classes=2 if y.dtype.kind == "i" else 0,
    example_shape=x.shape[1:],
  )
  batching = LocalBatching(batch_size=32)
  return make_simulator(task, algorithm, data, batching=batching, **others)


def margins(task, variables, x):
  assert task.logits is not None
  return np.asarray(task.logits(variables, {"x": jnp.asarray(x)})[:, -1])


def grow(x, g, h, cell, node_depth):
  """A function of examples: one tree, grown node by node in float64."""
  score = lambda a, b: a * a / (b + L2)
  best, split = 0.0, None
  for f in range(x.shape[1]):
    for b in range(BINS - 1):
      left = cell[:, f] <= b
      hl, hr = h[left].sum(), h[~left].sum()
      if min(hl, hr) < CHILD:
        continue
      gl, gr = g[left].sum(), g[~left].sum()
      gain = score(gl, hl) + score(gr, hr) - score(g.sum(), h.sum())
      gain = gain / 2 - GAIN
      if gain > best + 1e-9:
        best, split = gain, (f, b)
  if split is None or node_depth == DEPTH:
    return np.full(len(x), -RATE * g.sum() / (h.sum() + L2))
  f, b = split
  left = cell[:, f] <= b
  out = np.empty(len(x))
  for side in (left, ~left):
    out[side] = grow(x[side], g[side], h[side], cell[side], node_depth + 1)
  return out


@pytest.mark.parametrize("objective", ["logistic", "squared"])
def test_trees_are_those_of_the_pooled_data(objective):
  logistic = objective == "logistic"
  y = (MARGIN > 0).astype(np.int32) if logistic else MARGIN.astype(np.float32)
  task = trees_task((4,), 2, TREES, DEPTH, objective, low=-1.0, high=1.0)
  algorithm = gbdt(
    task,
    bins=BINS,
    learning_rate=RATE,
    l2=L2,
    min_gain=GAIN,
    min_child_weight=CHILD,
  )
  simulator = simulator_of(X, y, SIZES, task, algorithm, lanes=2, devices=2)
  cell = np.floor((X.astype(np.float64) + 1) / 2 * BINS)
  cell = np.clip(cell, 0, BINS - 1).astype(int)
  margin = np.zeros(len(X))
  for i, out in enumerate(simulator.run(simulator.init(), TREES * DEPTH + 1)):
    if (i + 1) % DEPTH == 0:
      chance = 1 / (1 + np.exp(-margin))
      g, h = (
        (chance - y, chance * (1 - chance))
        if logistic
        else (margin - y, np.ones(len(y)))
      )
      margin = margin + grow(X, g, h, cell, 0)
    variables = algorithm.variables(out.state.server)
    found = margins(task, variables, X)
    np.testing.assert_allclose(found, margin, rtol=1e-4, atol=1e-4)
  told = algorithm.state_metrics(out.state.server, {})
  assert told["trees"] == TREES


@pytest.mark.integration
def test_it_tells_tumors_apart_as_scikit_learn_does():
  x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(x))
  x, y = x[order], y[order].astype(np.int32)
  train, test = slice(0, 400), slice(400, None)
  ranks = np.stack(  # equal cells of ranks, as scikit-learn's bins
    [np.searchsorted(np.sort(c[train]), c) for c in x.T], axis=1
  )
  z = (ranks / 400).astype(np.float32)
  task = trees_task((30,), 2, trees=15, depth=3)
  algorithm = gbdt(task, bins=64)
  simulator = simulator_of(z[train], y[train], [100] * 4, task, algorithm)
  *_, out = simulator.run(simulator.init(), 45)
  variables = algorithm.variables(out.state.server)
  found = margins(task, variables, z[test])
  other = sklearn.ensemble.HistGradientBoostingClassifier(
    learning_rate=0.3,
    max_iter=15,
    max_depth=3,
    l2_regularization=1.0,
    min_samples_leaf=1,
    early_stopping=False,
  ).fit(x[train], y[train])
  auc = sklearn.metrics.roc_auc_score(y[test], found)
  theirs = sklearn.metrics.roc_auc_score(
    y[test], other.decision_function(x[test])
  )
  assert theirs > 0.98
  assert abs(auc - theirs) < 0.01


@pytest.mark.parametrize(("least", "cell"), [(0.5, 0), (1.5, 1), (2.5, None)])
def test_splits_with_too_little_on_a_side_are_none(least, cell):
  """The first gains most, with a second derivative of 1 on the left."""
  first, second = [9.0, -1.0, -8.0, 0.0], [1.0, 1.0, 1.0, 1.0]
  histogram = jnp.stack([jnp.array(first), jnp.array(second)], 1)[None, None]
  found = best_splits(histogram, *jnp.array([1.0, 0.0, least]))
  assert found.some.tolist() == [cell is not None]
  if cell is not None:
    assert found.cell.tolist() == [cell]
    sums = [[sum(first[: cell + 1]), cell + 1.0]]
    assert found.left.tolist() == sums
