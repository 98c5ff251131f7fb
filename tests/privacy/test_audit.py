"""Audits: how often they accuse, and whom."""

import importlib
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import PrivacySpec
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.accounting import Ledger
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.central.audit import LAWS, audit, moved, separation
from fedjax_sim.privacy.central.canaries import Canaries, Evidence, Moments
from fedjax_sim.privacy.central.factorization import banded
from fedjax_sim.privacy.central.guard import Budget
from fedjax_sim.simulation.simulator import Simulator
from problems import quadratic, quadratic_data, sgd, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
DELTA = 1e-5
EVERY_ROUND = sampling.Participation(1.0, 1, True)


@pytest.fixture
def law(monkeypatch):
  """The benchmark that draws canaries' scores from their law."""
  monkeypatch.syspath_prepend(str(ROOT))
  return importlib.import_module("benchmarks.audit")


def test_the_separation_is_a_bound_as_often_as_it_says():
  rng = np.random.default_rng(0)
  bounds = np.array(
    [
      separation(rng.normal(0.8, 1.0, 60), rng.normal(0.0, 1.0, 50), 0.05)
      for _ in range(1000)
    ]
  )
  wrong = (bounds > 0.8).sum()
  # A binomial number of 1000 with 5 %: within 4 deviations.
  assert abs(wrong - 50) < 4 * np.sqrt(1000 * 0.05 * 0.95)


@pytest.mark.parametrize(("t", "free"), [(3.0, 18), (30.0, 58), (5.0, 998)])
def test_the_separation_is_that_of_the_noncentral_t_law(t, free):
  half = (free + 2) // 2
  ones = np.resize([-1.0, 1.0], half) * np.sqrt(free / (free + 2))
  spread = np.sqrt(2 / half)
  found = separation(ones + t * spread, ones, 0.025) / spread
  exact = scipy.optimize.brentq(
    lambda x: scipy.stats.nct.sf(t, free, x) - 0.025, 0.0, t
  )
  assert 0.98 * exact - 0.02 < found < exact + 0.01


def test_the_bound_of_many_canaries_comes_close(law):
  mu = 1.0
  exact = scipy.optimize.brentq(
    lambda e: (
      scipy.stats.norm.cdf(mu / 2 - e / mu)
      - np.exp(e) * scipy.stats.norm.cdf(-mu / 2 - e / mu)
      - DELTA
    ),
    0.1,
    50,
  )
  setting = law.Setting(exact, DELTA, 1, EVERY_ROUND, 100_000)
  ledger = Ledger(PrivacySpec("gaussian", 1 / mu), EVERY_ROUND, DELTA)
  found = audit(law.drawn(setting, 1 / mu, 0), ledger, 1, resamples=0)
  assert 0.95 * exact < found.noise < exact
  assert found.epsilon == found.noise


@pytest.mark.parametrize("noise", LAWS)
@pytest.mark.parametrize(
  ("rounds", "rate", "canaries"), [(1, 1.0, 20), (1, 0.2, 200), (20, 0.1, 100)]
)
def test_the_noise_is_a_bound_as_often_as_it_says(
  law, noise, rounds, rate, canaries
):
  part = sampling.Participation(rate, 1, True)
  setting = law.Setting(1.0, DELTA, rounds, part, canaries, noise)
  deviation, kurtosis = LAWS[noise]
  wrong = 0
  for seed in range(400):
    found = law.drawn(setting, 1.5, seed)
    apart = moved(found.present, found.absent, 0.05, kurtosis)
    wrong += apart * deviation > 1 / 1.5
  assert wrong < 400 * 0.05 + 4 * np.sqrt(400 * 0.05 * 0.95)


SAMPLED = [
  (8.0, 20, 0.1, "gaussian"),
  *(
    pytest.param(*each, marks=pytest.mark.slow)
    for each in (
      (1.0, 20, 0.1, "gaussian"),
      (1.0, 1, 0.2, "gaussian"),
      (8.0, 1, 0.2, "gaussian"),
      (1.0, 20, 0.1, "laplace"),
      (8.0, 20, 0.1, "laplace"),
    )
  ),
]


@pytest.mark.parametrize(("epsilon", "rounds", "rate", "noise"), SAMPLED)
def test_too_little_noise_is_caught_under_sampling(
  law, epsilon, rounds, rate, noise
):
  part = sampling.Participation(rate, 1, True)
  setting = law.Setting(epsilon, DELTA, rounds, part, 500, noise)
  honest, _ = law.accused(setting, 1.0, 10)
  assert honest <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 10)
  broken, least = law.accused(setting, 4.0, 5)
  assert broken == 1
  assert least > 1.5 * epsilon


def evidence(scores, included, longest=1.0):
  """Of one round, in which all that are included take part."""
  included = np.asarray(included)
  scores = np.append(scores, 0.0)
  where = np.append(included, False)

  def moments(where):
    counted = np.where(where, scores, 0)
    return Moments(*map(jnp.float32, (where, counted, counted**2)))

  return Evidence(
    included=jnp.asarray(included),
    present=moments(where),
    absent=moments(~where),
    longest=jnp.float32(longest),
    unit=jnp.ones(()),
  )


def judged(given, release=PrivacySpec("gaussian", 1.0)):  # noqa: B008
  return audit(given, Ledger(release, EVERY_ROUND, DELTA), 1, resamples=10)


@pytest.mark.parametrize("included", [[True] * 8, [False] * 8])
def test_without_both_sides_nothing_is_betrayed(included):
  assert judged(evidence(np.arange(8.0), included)).epsilon == 0


def test_scores_that_are_all_alike_betray_nothing():
  found = judged(evidence(np.zeros(40), np.arange(40) < 20))
  assert found.epsilon == 0


def test_a_length_is_no_matter_of_chance():
  included = np.arange(40) < 20
  found = judged(evidence(np.zeros(40), included, 3.0))
  claimed = Ledger(PrivacySpec("gaussian", 1 / 3), EVERY_ROUND, DELTA).epsilon(
    1
  )
  assert abs(found.clip - claimed) < 1e-9
  assert found.accused
  # What rounding adds is no fault.
  assert not judged(evidence(np.zeros(40), included, 1 + 1e-5)).accused


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_scores_that_are_not_finite_prove_a_fault(score):
  scores = np.zeros(40)
  scores[3] = score
  found = judged(evidence(scores, np.arange(40) < 20))
  assert found.epsilon == np.inf
  assert found.accused


def test_the_bootstrap_is_around_the_estimate():
  rng = np.random.default_rng(0)
  included = rng.random(2000) < 0.5
  found = judged(evidence(rng.normal(size=2000) + included, included))
  low, high = found.bootstrap
  # At a rate of false alarms of 5 %, and delta below all counts.
  estimate = np.log(scipy.stats.norm.sf(1.645 - 1) / 0.05)
  assert low - 0.2 < estimate < high + 0.5
  assert 0 < found.clopper_pearson < found.claimed


@pytest.mark.parametrize(
  "bands", [None, pytest.param(2, marks=pytest.mark.slow)]
)
def test_an_honest_run_passes(bands):
  dim, canaries = 200, 60
  task = quadratic(dim)
  inner = fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform")
  sampler = sampling.cyclic(4, 2)
  assert sampler.participation is not None
  private = with_central_dp(
    inner,
    CentralDPConfig(
      clip_norm=1.0,
      noise_multiplier=0.4,
      denominator=2.0,
      strategy=bands and banded(2, bands),
      canaries=Canaries(canaries, sampler.participation),
    ),
  )
  simulator = Simulator(
    task=task,
    algorithm=private,
    data=quadratic_data(np.ones((4, dim))),
    sampler=sampler,
    batching=LocalBatching(batch_size=1),
    seed=0,
    noise_seed=0,
    budget=Budget(delta=DELTA),
  )
  found = simulator.account.audit(train(simulator, 2))
  assert simulator.account.ledger is not None
  assert found is not None
  assert found.claimed == simulator.account.ledger.epsilon(2)
  assert 0 < found.noise < found.claimed
  assert found.longest <= 1
  assert found.canaries == canaries
  assert (found.multiplier > 0.4) == (bands is None or found.multiplier > 1e9)
  assert found.describe().endswith("by 60 canaries (95%)")
