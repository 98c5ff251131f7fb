"""Federated k-means: Lloyd's algorithm, its noise, and the task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.kmeans import Clusters, kmeans
from fedjax_sim.core import Aggregate, Batch, Context, Members, PrivacySpec
from fedjax_sim.data import load_digits
from fedjax_sim.engine import traffic
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.kmeans import kmeans as centroids_task
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.privacy.accounting.calibration import calibrate
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from problems import blobs, make_simulator, params_of, sgd, train
from tiers import slow_but

SIZES = [3, 17, 8, 1, 30, 6]
DATA = blobs(SIZES, features=4, classes=5, seed=1)
X = DATA.train.examples["x"].astype(np.float64)
CLIENT_OF = np.repeat(np.arange(len(SIZES)), SIZES)
NEAR = X[[0, 9, 20, 40, 50]] + 0.25  # every centroid has examples


def task_from(centroids, low=-10.0, high=10.0):
  """The task, whose first centroids are these."""
  clusters, features = centroids.shape
  task = centroids_task((features,), clusters, low=low, high=high)

  def init(key):
    first = {"centroids": jnp.asarray(centroids, jnp.float32)}
    return task.init(key)._replace(params=first)

  return task._replace(init=init)


def simulator_from(centroids, *, data=DATA, options=None, rate=1.0, **others):
  task = task_from(centroids)
  algorithm = kmeans(task, sgd(rate), **(options or {}))
  return make_simulator(task, algorithm, data, **others)


def nearest(x, centroids):
  return ((x[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)


def lloyd(x, weights, centroids):
  """One iteration; centroids without examples stay."""
  own = nearest(x, centroids)
  new = np.array(centroids, np.float64)
  for j in range(len(centroids)):
    if (own == j).any():
      new[j] = np.average(x[own == j], axis=0, weights=weights[own == j])
  return new


def centroids_of(simulator, rounds):
  return params_of(simulator, train(simulator, rounds))["centroids"]


# --- Lloyd's algorithm --------------------------------------------------------


@pytest.mark.parametrize(
  ("lanes", "devices"), slow_but([(2, 2)], [(1, 1), (3, 1), (2, 2)])
)
def test_rounds_of_all_clients_are_lloyds_iterations(lanes, devices):
  far = NEAR.copy()
  far[3] = 9.0  # nobody's
  simulator = simulator_from(far, lanes=lanes, devices=devices)
  expected, state = far, simulator.init()
  for out in simulator.run(state, 6):
    expected = lloyd(X, np.ones(len(X)), expected)
    found = params_of(simulator, out.state)["centroids"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found[3], far[3])
  assert simulator.compilations == 1


def test_it_ends_where_scikit_learn_does():
  simulator = simulator_from(NEAR)
  other = sklearn.cluster.KMeans(
    len(NEAR), init=NEAR, n_init=1, algorithm="lloyd", tol=0, max_iter=30
  ).fit(X)
  found = centroids_of(simulator, 30)
  np.testing.assert_allclose(found, other.cluster_centers_, atol=1e-5)
  rows = [
    row for out in simulator.run(simulator.init(), 31) for row in out.rows
  ]
  inertia = rows[-1]["train/loss"] * len(X)
  np.testing.assert_allclose(inertia, other.inertia_, rtol=1e-5)


def test_clients_may_count_the_same():
  simulator = simulator_from(NEAR, options={"weighting": "uniform"})
  weights = 1 / np.array(SIZES)[CLIENT_OF]
  expected = lloyd(X, weights, NEAR)
  np.testing.assert_allclose(centroids_of(simulator, 1), expected, atol=1e-5)


def test_a_rate_below_one_goes_part_of_the_way():
  simulator = simulator_from(NEAR, rate=0.25)
  expected = NEAR + 0.25 * (lloyd(X, np.ones(len(X)), NEAR) - NEAR)
  np.testing.assert_allclose(centroids_of(simulator, 1), expected, atol=1e-5)


def test_centroids_stay_in_the_range():
  task = task_from(np.clip(NEAR, -0.5, 0.5), low=-0.5, high=0.5)
  simulator = make_simulator(task, kmeans(task, sgd(1.0)), DATA)
  expected = lloyd(X, np.ones(len(X)), np.clip(NEAR, -0.5, 0.5))
  assert np.abs(expected).max() > 0.6
  found = centroids_of(simulator, 1)
  np.testing.assert_allclose(found, np.clip(expected, -0.5, 0.5), atol=1e-5)


# --- empty clusters -----------------------------------------------------------


def applied(counts, *, seed=0, **options):
  """Five centroids on the diagonal, after a round of clusters of this size.

  The mean of every cluster lies 0.5 above its centroid.
  """
  start = np.arange(5.0)[:, None] * np.ones((1, 3))
  task = task_from(start)
  algorithm = kmeans(task, sgd(1.0), **options)
  hparams = jax.tree.map(jnp.float32, dict(algorithm.hparams))
  counts = jnp.asarray(counts, jnp.float32)
  gaps = 0.5 * counts[:, None] * jnp.ones((1, 3))
  none = jnp.zeros(1, bool)
  nobody = Members(jnp.zeros(1, int), none, jnp.zeros(1), {})
  aggregate = Aggregate(
    update=Clusters(gaps, hparams["count_weight"] * counts),
    buffers=(),
    statistics=(),
    weight=jnp.float32(1),
    clients=jnp.int32(1),
    members=nobody,
  )
  key = jax.random.key(seed)
  context = Context(hparams, jnp.int32(0), key, key, 1)
  server = algorithm.init(jax.random.key(0), hparams)
  after = algorithm.apply(server, aggregate, context)
  return start, np.asarray(after.variables.params["centroids"])


@pytest.mark.parametrize(
  ("counts", "least", "moved"),
  [
    ([1, 2, 3, 4, 10], 0.0, [1, 1, 1, 1, 1]),
    ([1, 2, 3, 4, 10], 0.12, [0, 0, 1, 1, 1]),
    ([0, 2, 0, 0, 1], 0.0, [0, 1, 0, 0, 1]),
    ([-0.3, 0.2, -0.1, 0.5, 0.1], 0.0, [0, 1, 0, 1, 1]),  # with noise
    ([-1, -1, -1, -1, 2], 0.0, [0, 0, 0, 0, 1]),
    ([0, 0, 0, 0, 0], 0.0, [0, 0, 0, 0, 0]),
  ],
)
def test_empty_clusters_stay(counts, least, moved):
  before, after = applied(counts, least_share=least, count_weight=0.3)
  expected = before + 0.5 * np.array(moved)[:, None]
  np.testing.assert_allclose(after, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("counts", "goals"),
  [
    ([4, 0, 9, -1, 6], {3: 2, 1: 4}),  # the smallest to the largest
    ([0, 0, 0, 5, 0], {0: 3, 1: 3, 2: 3, 4: 3}),
    ([0, 1, 0, 5, 0], {0: 3, 2: 1, 4: 3}),
    ([0, 0, 0, 0, 0], {}),
  ],
)
def test_empty_clusters_split_large_ones(counts, goals):
  before, after = applied(counts, empty="split")
  full = np.array(counts)[:, None] > 0
  expected = before + np.where(full, 0.5, 0)
  for one, goal in goals.items():
    expected[one] = expected[goal]
  gaps = after - expected
  split = sorted(goals)
  stay = [j for j in range(5) if j not in goals]
  np.testing.assert_allclose(gaps[stay], 0, atol=1e-6)
  assert (np.abs(gaps[split]) < 0.01 * 20 * 5).all()
  assert (np.abs(gaps[split]).max(axis=1, initial=0) > 0).all()
  _, again = applied(counts, empty="split", seed=1)
  assert (again[split] != after[split]).all()


# --- privacy ------------------------------------------------------------------


def contribution(private, x, centroids, hparams):
  """What a client with these examples sends."""
  server = private.init(jax.random.key(0), hparams)
  server = private.with_model(
    server,
    private.variables(server)._replace(params={"centroids": centroids}),
  )
  client, (carry,) = traffic._begin(private, server, (), hparams)
  batch = Batch({"x": x}, jnp.ones(len(x), bool))
  carry = private.passes[0].step(client, carry, batch, jax.random.key(0))
  return private.postprocess_report(
    client, private.finish(client, carry)
  ).update.update


numbers = st.floats(-1e3, 1e3, width=32)


@pytest.mark.parametrize("order", [1, 2])
def test_a_clients_gaps_and_counts_have_one_norm(order):
  task = centroids_task((3,), 4, low=-1e3, high=1e3)
  private = with_central_dp(
    kmeans(task, sgd(1.0)),
    CentralDPConfig(
      clip_norm=1.0,
      noise_multiplier=1.0,
      denominator=5.0,
      noise="laplace" if order == 1 else "gaussian",
    ),
  )
  compute = jax.jit(functools.partial(contribution, private))
  longest = 0.0

  @settings(max_examples=100, derandomize=True)
  @given(
    x=arrays.arrays(np.float32, (5, 3), elements=numbers),
    centroids=arrays.arrays(np.float32, (4, 3), elements=numbers),
    clip_norm=st.sampled_from([1e-2, 1.0, 1e4]),
    count_weight=st.sampled_from([1e-2, 1.0, 1e3]),
  )
  def check(x, centroids, clip_norm, count_weight):
    nonlocal longest
    hparams = jax.tree.map(jnp.float32, dict(private.hparams))
    hparams["privacy"]["clip_norm"] = jnp.float32(clip_norm)
    hparams["count_weight"] = jnp.float32(count_weight)
    gaps, counts = jax.device_get(compute(x, centroids, hparams))
    sent = np.concatenate([np.ravel(gaps), counts]).astype(np.float64)
    length = np.linalg.norm(sent, order)
    assert length <= 1
    longest = max(longest, float(length))

  check()
  assert longest > 0.99


def inertia_of(epsilon):
  """Mean squared distance on the digits' test set, after ten rounds."""
  data = load_digits(num_clients=100, alpha=1.0)
  task = centroids_task(data.example_shape, data.num_classes)
  algorithm = kmeans(task, sgd(0.5), count_weight=0.3, empty="split")
  sampler = sampling.poisson(100, 100)
  if epsilon is not None:
    assert sampler.participation is not None
    release = calibrate(
      PrivacySpec("gaussian", 1.0),
      sampler.participation,
      10,
      1e-3,
      epsilon,
      "gdp",
    )
    settings_ = CentralDPConfig(
      clip_norm=0.5, noise_multiplier=release.multiplier, denominator=100.0
    )
    algorithm = with_central_dp(algorithm, settings_)
  simulator = make_simulator(
    task,
    algorithm,
    data,
    sampler=sampler,
    batching=LocalBatching(batch_size=64),
    rounds_per_dispatch=10,
  )
  state = train(simulator, 10)
  assert simulator.compilations == 1
  return simulator.evaluate(state)["test/loss"]


@pytest.mark.slow
def test_centroids_are_better_with_a_greater_epsilon():
  losses = [inertia_of(epsilon) for epsilon in (1.0, 8.0, 64.0, None)]
  assert losses[0] > 1.2 * losses[1]
  assert losses[1] > 1.05 * losses[2]
  assert losses[2] < 1.1 * losses[3]  # with little noise, nearly as without


# --- the task -----------------------------------------------------------------


def test_the_loss_is_the_squared_distance_to_the_nearest():
  task = centroids_task((2, 2), 3)
  x = np.random.default_rng(0).normal(size=(5, 2, 2)).astype(np.float32)
  examples = {"x": jnp.asarray(x)}
  variables = task.init(jax.random.key(0))
  centroids = np.asarray(variables.params["centroids"], np.float64)
  squares = ((x.reshape(5, 1, 4) - centroids[None]) ** 2).sum(-1)
  found = task.loss(variables, examples, jax.random.key(0)).value
  np.testing.assert_allclose(found, squares.min(1), rtol=1e-6)
  assert task.logits is not None
  logits = task.logits(variables, examples)
  np.testing.assert_allclose(logits, -squares, rtol=1e-6)


def test_the_task_can_be_trained_with_gradients():
  task = task_from(NEAR)
  rows = []
  simulator = make_simulator(task, fedavg(task, sgd(0.05), sgd(1.0)), DATA)
  for out in simulator.run(simulator.init(), 20):
    rows += out.rows
  assert rows[-1]["train/loss"] < 0.9 * rows[0]["train/loss"]


@pytest.mark.parametrize("features", [1, 2, 30])
def test_spread_centroids_keep_their_distance(features):
  inits = {
    init: jax.jit(
      centroids_task((features,), 6, low=-2.0, high=4.0, init=init).init
    )
    for init in ("spread", "uniform")
  }

  def gap(init, seed):
    found = inits[init](jax.random.key(seed)).params["centroids"]
    x = np.asarray(found, np.float64)
    assert x.shape == (6, features)
    assert (x >= -2).all()
    assert (x <= 4).all()
    apart = np.linalg.norm(x[:, None] - x[None], axis=-1)
    border = min((x + 2).min(), (4 - x).min())
    return min(apart[~np.eye(6, dtype=bool)].min() / 2, border)

  spread, uniform = (
    np.array([gap(init, seed) for seed in range(5)]) for init in inits
  )
  assert (spread > uniform).all()  # the radius of balls within the range
  assert spread.min() > {1: 0.3, 2: 0.6, 30: 2.0}[features]
  if features == 1:
    assert spread.max() <= 0.5  # six balls fill a range of 6


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"clusters": 0}, "clusters=0 is out of range"),
    ({"clusters": 2.0}, "clusters=2.0 is a float"),
    ({"low": 1.0}, "high=1.0 is out of range; give .* > 1"),
    ({"init": "sphere"}, "init='sphere' is unknown"),
  ],
)
def test_what_the_task_refuses(options, message):
  with pytest.raises((TypeError, ValueError), match=message):
    centroids_task((3,), 4, **options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"count_weight": 0.0}, "count_weight=0.0 is out of range"),
    ({"least_share": 1.0}, "least_share=1.0 is out of range"),
    ({"empty": "drop"}, "empty='drop' is unknown"),
    ({"weighting": "all"}, "weighting='all' is unknown"),
  ],
)
def test_what_the_algorithm_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    kmeans(centroids_task((3,), 4), sgd(1.0), **options)


def test_a_model_without_centroids_is_refused():
  with pytest.raises(ValueError, match="set model.name='kmeans'"):
    kmeans(logistic_regression((3,), 2), sgd(1.0))


def test_a_task_without_the_function_of_a_statistic_is_refused():
  task = centroids_task((3,), 4)._replace(logits=None)
  with pytest.raises(ValueError, match="'kmeans' needs Task.logits"):
    kmeans(task, sgd(1.0))
