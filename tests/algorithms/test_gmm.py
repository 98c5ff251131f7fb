"""Federated mixtures: EM on pooled data, online EM, and noise."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.mixture
from sklearn.exceptions import ConvergenceWarning

from fedjax_sim import sampling
from fedjax_sim.algorithms.gmm import Moments, gmm
from fedjax_sim.core import Aggregate, Context, Members
from fedjax_sim.models.gmm import gmm as mixture_task
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from problems import blobs, make_simulator, params_of
from tiers import slow_but

SIZES = [3, 17, 8, 1, 30, 6]
DATA = blobs(SIZES, features=3, classes=3, seed=1)
X = DATA.train.examples["x"].astype(np.float64)
RIDGE = 1e-3


def task_of(covariance, components=3, low=-5.0, high=5.0):
  """The mixture, whose first means are examples."""
  task = mixture_task((3,), components, None, covariance, low, high)

  def init(key):
    variables = task.init(key)
    first = jnp.asarray(X[[0, 20, 40][:components]], jnp.float32)
    return variables._replace(params={**variables.params, "means": first})

  return task._replace(init=init)


def simulator_of(covariance, **others):
  task = task_of(covariance)
  options = {
    k: others.pop(k) for k in ("learning_rate", "weighting") if k in others
  }
  algorithm = gmm(task, min_variance=RIDGE, **options)
  return make_simulator(task, algorithm, DATA, **others)


def parameters(params):
  return tuple(
    np.asarray(params[k], np.float64)
    for k in ("weights", "means", "covariances")
  )


def e_step(x, params):
  """Responsibilities and mean log-likelihood, by scipy in float64."""
  weights, means, covariances = params
  logs = np.stack(
    [
      np.log(w)
      + scipy.stats.multivariate_normal(
        m, np.diag(c) if c.ndim == 1 else c
      ).logpdf(x)
      for w, m, c in zip(weights, means, covariances, strict=True)
    ],
    axis=1,
  )
  norm = np.logaddexp.reduce(logs, axis=1)
  return np.exp(logs - norm[:, None]), norm.mean()


def statistics(x, params, diagonal):
  """Means of the sufficient statistics, not shifted."""
  own, _ = e_step(x, params)
  products = x**2 if diagonal else x[:, :, None] * x[:, None, :]
  return [
    own.mean(0),
    own.T @ x / len(x),
    np.tensordot(own.T, products, 1) / len(x),
  ]


def m_step(moments, diagonal):
  weights, first, second = moments
  means = first / weights[:, None]
  stretch = weights.reshape(-1, *[1] * (second.ndim - 1))
  if diagonal:
    return weights, means, second / stretch - means**2 + RIDGE
  outer = means[:, :, None] * means[:, None, :]
  ridge = RIDGE * np.eye(means.shape[1])
  return weights, means, second / stretch - outer + ridge


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_rounds_of_all_clients_are_scikit_learns_iterations(covariance):
  simulator = simulator_of(covariance, lanes=2, devices=2)
  start = simulator.init()
  weights, means, covariances = parameters(params_of(simulator, start))
  other = sklearn.mixture.GaussianMixture(
    n_components=3,
    covariance_type={"diagonal": "diag"}.get(covariance, covariance),
    reg_covar=RIDGE,
    max_iter=1,
    tol=0,
    warm_start=True,
    weights_init=weights / weights.sum(),
    means_init=means,
    precisions_init=1 / covariances
    if covariance == "diagonal"
    else np.linalg.inv(covariances),
  )
  likelihoods, rows = [], []
  for out in simulator.run(start, 6):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConvergenceWarning)
      other.fit(X)
    rows += out.rows
    params = params_of(simulator, out.state)
    expected = (other.weights_, other.means_, other.covariances_)
    for ours, theirs in zip(parameters(params), expected, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    likelihoods.append(e_step(X, parameters(params))[1])
  assert (np.diff(likelihoods) > -1e-6).all()
  assert likelihoods[-1] > likelihoods[0] + 0.01
  # Training reports the loss of the model before the round.
  told = [row["train/loss"] for row in rows[1:]]
  np.testing.assert_allclose(told, -np.array(likelihoods[:-1]), rtol=1e-5)
  assert simulator.compilations == 1


@pytest.mark.parametrize("covariance", slow_but(["full"], ["diagonal", "full"]))
def test_a_few_clients_move_statistics_part_of_the_way(covariance):
  sampler = sampling.uniform(len(SIZES), 2)
  simulator = simulator_of(covariance, learning_rate=0.3, sampler=sampler)
  diagonal = covariance == "diagonal"
  state = simulator.init()
  now = parameters(params_of(simulator, state))
  weights, means, covariances = now
  ends = np.cumsum([0, *SIZES])
  # Unshifted statistics, whose M step is where the model begins.
  if diagonal:
    second = weights[:, None] * (covariances - RIDGE + means**2)
  else:
    outer = means[:, :, None] * means[:, None, :]
    second = weights[:, None, None] * (covariances - RIDGE * np.eye(3) + outer)
  moments = [weights, weights[:, None] * means, second]
  for round_, out in enumerate(simulator.run(state, 3)):
    ids = sampler.sample(simulator.seed, round_)
    x = np.concatenate([X[ends[i] : ends[i + 1]] for i in ids])
    new = statistics(x, now, diagonal)
    moments = [s + 0.3 * (n - s) for s, n in zip(moments, new, strict=True)]
    now = m_step(moments, diagonal)
    found = parameters(params_of(simulator, out.state))
    for ours, theirs in zip(found, now, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_noise_leaves_a_mixture(covariance):
  """Whatever noise does to the statistics, the model stays one."""
  task = task_of(covariance)
  algorithm = gmm(task, least_share=0.01, min_variance=RIDGE)
  hparams = jax.tree.map(jnp.float32, dict(algorithm.hparams))
  server = algorithm.init(jax.random.key(0), hparams)
  key = jax.random.key(0)
  none = jnp.zeros(1, bool)
  members = Members(jnp.zeros(1, int), none, jnp.zeros(1), {})
  context = Context(hparams, jnp.int32(0), key, key, 1)
  apply = jax.jit(algorithm.apply)
  rng = np.random.default_rng(0)
  shapes = [(3,), (3, 3), (3, 3) if covariance == "diagonal" else (3, 6)]
  moved = 0
  for scale in (1e-6, 0.3, 30.0) * 4:
    noise = [
      jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in shapes
    ]
    update = Moments(*noise)
    aggregate = Aggregate(update, (), (), jnp.float32(1), jnp.int32(1), members)
    before, server = server, apply(server, aggregate, context)
    weights, means, covariances = parameters(server.params)
    moved += not np.array_equal(means, before.params["means"])
    if np.sum(update.counts) < 1e-3:  # nothing is left of the clients
      assert np.array_equal(means, before.params["means"])
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert (weights > 0).all()
    assert (np.abs(means) <= 5).all()
    if covariance == "full":
      covariances = np.linalg.eigvalsh(covariances)
      assert covariances.max() <= 1.001 * (RIDGE + 25 * 3)
      assert covariances.min() >= RIDGE - 1e-4 * covariances.max()
    else:
      assert covariances.min() >= 0.999 * RIDGE
      assert covariances.max() <= 1.001 * (RIDGE + 25)
  assert moved > 2


@pytest.mark.slow
def test_clipping_alone_changes_little_of_what_counts():
  """Shorter reports have the same direction, so one client fits as well."""
  task = task_of("diagonal")
  config = CentralDPConfig(
    clip_norm=0.01, noise_multiplier=1e-6, denominator=1.0
  )
  private = with_central_dp(gmm(task, min_variance=RIDGE), config)
  simulator = make_simulator(
    task, private, DATA, sampler=sampling.uniform(len(SIZES), 1)
  )
  plain = make_simulator(
    task,
    gmm(task, min_variance=RIDGE),
    DATA,
    sampler=sampling.uniform(len(SIZES), 1),
  )
  one, other = (
    parameters(params_of(s, next(iter(s.run(s.init(), 1))).state))
    for s in (simulator, plain)
  )
  for a, b in zip(one, other, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_what_is_wrong_is_said():
  with pytest.raises(ValueError, match="covariance"):
    mixture_task((3,), 2, covariance="spherical")
  with pytest.raises(ValueError, match="learning_rate=2.0"):
    gmm(task_of("full"), learning_rate=2.0)
  with pytest.raises(ValueError, match="model.name='gmm'"):
    gmm(
      task_of("full")._replace(
        init=lambda key: task_of("full").init(key)._replace(params={})
      )
    )
