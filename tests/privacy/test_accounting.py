"""Epsilons: against dp-accounting, closed forms and what others published."""

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from fedjax_sim.core import PrivacySpec
from fedjax_sim.core.files import plain
from fedjax_sim.privacy import accounting, draws
from fedjax_sim.privacy.accounting import Ledger, accountants
from fedjax_sim.privacy.accounting.accountants import Step
from fedjax_sim.privacy.central import guard
from fedjax_sim.sampling import Participation, poisson, uniform

RELATION = dp_accounting.NeighboringRelation


def promised(sampler) -> Participation:
  assert sampler.participation is not None
  return sampler.participation


def release(multiplier=1.0, noise="gaussian", **fields):
  return PrivacySpec(noise, multiplier, **fields)


EXACT = 1e-5 / draws.KEPT  # of which mechanisms have 1e-5


def ledger(
  multiplier=1.0,
  rate=0.02,
  *,
  delta=EXACT,
  accountant="pld",
  noise="gaussian",
  period=1,
  independent=True,
  population=None,
  **fields,
):
  return Ledger(
    release(multiplier, noise, **fields),
    Participation(rate, period, independent, population),
    delta,
    accountant,
  )


# --- against dp-accounting ----------------------------------------------------


def theirs(accountant, event, count, delta=1e-5):
  return accountant.compose(event, count).get_epsilon(delta)


@pytest.mark.parametrize(
  ("multiplier", "rate"), [(1.0, 0.02), (0.9, 2e-3), (5.0, 0.5), (2.0, 1.0)]
)
@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_pld_is_theirs_with_a_finer_grid(noise, multiplier, rate):
  event = {
    "gaussian": dp_accounting.GaussianDpEvent,
    "laplace": dp_accounting.LaplaceDpEvent,
  }[noise](multiplier)
  event = dp_accounting.PoissonSampledDpEvent(rate, event)
  ours = ledger(multiplier, rate, noise=noise)
  for count in (1, 30):
    finer = pld.PLDAccountant(value_discretization_interval=1e-4)
    expected = theirs(finer, event, count)
    assert ours.epsilon(count) == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize("rate", [0.02, 0.5, 1.0])
def test_rdp_is_theirs(rate):
  event = dp_accounting.GaussianDpEvent(1.5)
  event = dp_accounting.PoissonSampledDpEvent(rate, event)
  ours = ledger(1.5, rate, accountant="rdp")
  expected = theirs(rdp.RdpAccountant(), event, 200)
  assert ours.epsilon(200) == pytest.approx(expected, rel=1e-12)


def test_rdp_of_laplace_noise_without_sampling_is_theirs():
  ours = ledger(3.0, 1.0, noise="laplace", accountant="rdp")
  expected = theirs(rdp.RdpAccountant(), dp_accounting.LaplaceDpEvent(3.0), 10)
  assert ours.epsilon(10) == pytest.approx(expected, rel=1e-12)


# --- published ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("population", "cohort", "multiplier", "epochs", "delta", "published"),
  [
    # Their tests of compute_dp_sgd_privacy; epochs x examples / batch rounds.
    (60_000, 150, 1.3, 15, 1e-5, 0.7242234026109595),
    (100_000, 100, 1.0, 30, 1e-7, 1.4154988495444842),
  ],
)
def test_tensorflow_privacy_by_rdp(
  population, cohort, multiplier, epochs, delta, published
):
  rounds = epochs * population // cohort
  ours = Ledger(
    release(multiplier),
    promised(poisson(population, cohort)),
    delta / draws.KEPT,
    "rdp",
  )
  assert ours.epsilon(rounds) == pytest.approx(published, abs=1e-7)


@pytest.mark.parametrize(
  ("accountant", "rate", "rounds", "published"),
  [
    ("rdp", 0.01, 120, 3.2392676),
    ("pld", 0.01, 120, 2.4612381),
    ("rdp", 1.0, 2, 10.8602036),
    ("pld", 1.0, 2, 10.1224946),
  ],
)
def test_tensorflow_privacy_by_both(accountant, rate, rounds, published):
  """Their tests of one example's privacy, noise multiplier 0.7."""
  ours = ledger(0.7, rate, accountant=accountant)
  assert ours.epsilon(rounds) == pytest.approx(published, rel=3e-4)


def test_tensorflow_privacy_mnist_tutorial():
  """Published: 2.92, by the RDP of 2019, whose conversion was looser."""
  ours = promised(poisson(60_000, 256))
  rounds = 60 * 60_000 // 256
  by = lambda name: Ledger(release(1.12), ours, 1e-5, name).epsilon(rounds)
  assert by("pld") < by("rdp")
  assert 0.8 * 2.92 < by("rdp") < 2.92


def test_moments_accountant():
  """Abadi et al. 2016 (arXiv 1607.00133), section 5.1: 1.26."""
  orders = np.arange(2, 65)
  sampled = dp_accounting.PoissonSampledDpEvent(
    0.01, dp_accounting.GaussianDpEvent(4.0)
  )
  moments = rdp.RdpAccountant(orders).compose(sampled, 10_000).rdp
  classic = np.min(moments + math.log(1e5) / (orders - 1))
  assert classic == pytest.approx(1.26, abs=0.005)
  by = lambda name: ledger(4.0, 0.01, accountant=name).epsilon(10_000)
  assert 0.7 * classic < by("pld") < by("rdp") < classic


# --- closed forms -------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "gdp"])
@pytest.mark.parametrize("rounds", [1, 25])
def test_gaussian_without_sampling(accountant, rounds):
  """Balle and Wang 2018, theorem 8: delta(epsilon) in closed form."""
  epsilon = ledger(4.0, 1.0, accountant=accountant).epsilon(rounds)
  mu = math.sqrt(rounds) / 4.0
  low, high = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
  delta = stats.norm.cdf(low) - math.exp(epsilon) * stats.norm.cdf(high)
  assert delta == pytest.approx(1e-5, rel=1e-6)


def test_pure_laplace():
  """A sum of t releases is t / scale private even with a delta of 0."""
  ours = ledger(2.0, 1.0, noise="laplace", delta=1e-9)
  for rounds in (1, 3, 6):
    pure = rounds / 2.0
    assert 0.95 * pure < ours.epsilon(rounds) <= pure + 1e-6


def test_one_sampled_laplace_release():
  """Amplification of pure privacy: log(1 + q (exp(epsilon) - 1))."""
  epsilon = ledger(1.0, 0.1, noise="laplace", delta=1e-9).epsilon(1)
  amplified = math.log1p(0.1 * math.expm1(1.0))
  assert epsilon == pytest.approx(amplified, abs=1e-4)


def divergence(epsilon, rate, spread):
  """Of (1 - q) N(0) + q N(1) from N(0), by quadrature."""
  density = lambda x, mean: stats.norm.pdf(x, mean, spread)
  start = spread**2 * math.log1p(math.expm1(epsilon) / rate) + 0.5
  excess = lambda x: (
    rate * density(x, 1) + (1 - rate - math.exp(epsilon)) * density(x, 0)
  )
  return integrate.quad(excess, start, start + 12 * spread)[0]


@pytest.mark.parametrize("independent", [True, False])
def test_one_sampled_gaussian_release(independent):
  """One release: a fixed-size cohort is as Poisson with half of the noise."""
  epsilon = ledger(3.0, 0.1, independent=independent).epsilon(1)
  spread = 3.0 if independent else 1.5
  exact = optimize.brentq(
    lambda e: divergence(e, 0.1, spread) - 1e-5, 1e-3, 10.0
  )
  assert epsilon == pytest.approx(exact, rel=1e-4)


# --- cohorts of a fixed size --------------------------------------------------


@pytest.mark.parametrize(
  ("multiplier", "rate", "rounds"),
  [(2.0, 0.02, 1), (2.0, 0.01, 300), (4.0, 0.1, 100), (6.0, 0.5, 30)],
)
def test_fixed_size_is_between_poisson_and_the_renyi_bound(
  multiplier, rate, rounds
):
  """With half of the noise, as replacing a client moves the sum twice as far.

  The Rényi bound is of Wang, Balle, Kasiviswanathan 2019.
  """
  fixed = ledger(multiplier, rate, independent=False).epsilon(rounds)
  half = ledger(multiplier / 2, rate).epsilon(rounds)
  event = dp_accounting.SampledWithoutReplacementDpEvent(
    1000, round(1000 * rate), dp_accounting.GaussianDpEvent(multiplier / 2)
  )
  accountant = rdp.RdpAccountant(neighboring_relation=RELATION.REPLACE_ONE)
  bound = theirs(accountant, event, rounds)
  assert half * (1 - 1e-3) <= fixed <= bound
  by_rdp = ledger(multiplier, rate, independent=False, accountant="rdp")
  assert by_rdp.epsilon(rounds) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_fixed_size_dominates_any_order_of_neighbors(noise):
  """Rounds of one kind and of the other, composed by dp-accounting.

  A client may be the one that stands out in some rounds, and the one that does
  not in others.
  """
  make = {
    "gaussian": pld.privacy_loss_distribution.from_gaussian_mechanism,
    "laplace": pld.privacy_loss_distribution.from_laplace_mechanism,
  }[noise]
  both = make(0.75, sampling_prob=0.1, value_discretization_interval=1e-3)
  removed, added = both._pmf_remove, both._pmf_add
  fixed = ledger(1.5, 0.1, noise=noise, independent=False).epsilon(20)
  for removals in (1, 10, 19):
    composed = removed.self_compose(removals).to_dense_pmf()
    composed = composed.compose(
      added.self_compose(20 - removals).to_dense_pmf()
    )
    assert 0 < composed.get_epsilon_for_delta(1e-5) <= fixed


def test_the_loss_of_a_fixed_size_is_as_likely_either_way():
  step = Step("gaussian", 1.0, 0.1, fixed=True)
  (loss,) = accountants._losses(step)
  _, first, masses, _ = loss.composed(3)
  losses = loss._interval * (first + np.arange(len(masses)))
  chance = dict(zip(losses.round(9), masses, strict=True))
  for epsilon in (0.1, 0.5, 2.0):
    back = chance[-epsilon] * math.exp(epsilon)
    assert chance[epsilon] == pytest.approx(back, rel=1e-6)


# --- invariants ---------------------------------------------------------------

RATES = st.floats(0.005, 1.0)
NOISE = st.floats(0.5, 20.0)
QUICK = settings(max_examples=8, deadline=None)


@QUICK
@given(RATES, NOISE, st.integers(1, 40), st.booleans(), st.integers(1, 4))
def test_more_rounds_cost_more(rate, multiplier, rounds, independent, period):
  ours = ledger(multiplier, rate, independent=independent, period=period)
  one, more = ours.epsilon(rounds), ours.epsilon(rounds + period)
  assert 0 <= one < more < math.inf


@QUICK
@given(RATES, NOISE, st.integers(1, 40), st.floats(1.05, 3.0))
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_more_noise_and_fewer_clients_cost_less(
  accountant, rate, multiplier, rounds, factor
):
  cost = lambda m, q: ledger(m, q, accountant=accountant).epsilon(rounds)
  here = cost(multiplier, rate)
  assert cost(factor * multiplier, rate) < here
  assert cost(multiplier, rate / factor) <= here


@QUICK
@given(RATES, NOISE, st.integers(1, 40))
def test_pld_is_never_above_rdp(rate, multiplier, rounds):
  tight, loose = (
    ledger(multiplier, rate, accountant=name).epsilon(rounds)
    for name in ("pld", "rdp")
  )
  assert tight <= loose * (1 + 1e-3)


@QUICK
@given(st.floats(0.1, 5.0), st.integers(0, 60))
def test_rounds_within(epsilon, most):
  ours = ledger(2.0, 0.1)
  last = ours.rounds_within(epsilon, most)
  assert 0 <= last <= most
  assert ours.epsilon(last) <= epsilon
  assert last == most or ours.epsilon(last + 1) > epsilon


def test_epsilon_does_not_depend_on_what_was_asked_before():
  """A run that goes on from a checkpoint tells the same."""
  ours = ledger(1.0, 0.03)
  forwards = [ours.epsilon(t) for t in range(1, 9)]
  accountants.epsilon.cache_clear()
  accountants._losses.cache_clear()
  backwards = [ours.epsilon(t) for t in range(8, 0, -1)]
  assert forwards == backwards[::-1]


# --- what is neighboring, what is counted ------------------------------------


def test_adjacency():
  cases: dict[str, list[Participation]] = {
    "add-or-remove": [promised(poisson(90, 10, population=100))],
    "replace-one": [
      promised(uniform(100, 10)),
      promised(uniform(100, 100)),
      Participation(0.1, 5),
    ],
    "zero-out": [
      promised(poisson(100, 10)),
      promised(poisson(100, 100)),
      Participation(1.0, 10),
      Participation(0.1, 5, independent=True),
    ],
  }
  for name, participations in cases.items():
    for participation in participations:
      ours = Ledger(release(), participation, 1e-5)
      assert ours.adjacency == name
      assert accounting.MEANING[name] in ours.describe(3)


def test_replacing_is_adding_and_removing():
  """Everybody in every round: the sensitivity doubles, nothing else."""
  replaced = ledger(8.0, 1.0, independent=False).epsilon(10)
  assert replaced == ledger(4.0, 1.0).epsilon(10)


def test_a_period_counts_participations():
  every = ledger(3.0, 0.2)
  seldom = ledger(3.0, 0.2, period=5)
  for rounds, times in ((1, 1), (5, 1), (6, 2), (25, 5)):
    assert seldom.epsilon(rounds) == every.epsilon(times)
  in_order = ledger(3.0, 1.0, period=10, independent=False)
  assert in_order.epsilon(30) == ledger(3.0, 1.0).epsilon(3)  # not doubled


def test_no_rounds_and_no_noise():
  assert ledger(0.0).epsilon(0) == 0
  assert ledger(0.0).epsilon(1) == math.inf
  assert ledger(0.0).rounds_within(100.0, 5) == 0


@given(multiplier=st.floats(0.5, 5.0), rounds=st.integers(1, 40))
def test_what_is_told_is_never_less(multiplier, rounds):
  made = ledger(multiplier, 1.0)
  exact, told = made.epsilon(rounds), made.told(rounds)
  assert exact <= told <= exact * 1.0011
  assert float(f"{told:.4g}") == told


# --- correlated noise ---------------------------------------------------------


def column_norms(rounds, period):
  """Of the prefix sums of a decaying column, at every `period`-th round."""
  matrix = np.tril(0.5 ** np.abs(np.subtract.outer(*[np.arange(rounds)] * 2)))
  return float(np.linalg.norm(matrix[:, ::period].sum(axis=1)))


def test_correlated_noise_without_sampling_is_one_release():
  ours = ledger(
    2.0, 1.0, period=4, independent=False, sensitivity=column_norms, bands=None
  )
  for rounds in (1, 9, 16):
    moved = column_norms(rounds, 4)
    expected = dp_accounting.get_epsilon_gaussian(2.0 / moved, 1e-5)
    assert ours.epsilon(rounds) == pytest.approx(expected, rel=1e-9)
  always = ledger(
    2.0, 1.0, independent=False, sensitivity=column_norms, bands=None
  )
  expected = dp_accounting.get_epsilon_gaussian(
    2.0 / (2 * column_norms(6, 1)), 1e-5
  )
  assert always.epsilon(6) == pytest.approx(expected, rel=1e-9)


def test_banded_noise_is_amplified():
  banded = ledger(
    3.0, 0.1, period=4, sensitivity=column_norms, bands=4, rounds=12
  )
  alone = column_norms(12, 12)
  assert banded.epsilon(12) == ledger(3.0 / alone, 0.1).epsilon(3)
  with pytest.raises(ValueError, match="rounds=13 are more than the 12"):
    banded.epsilon(13)
  assert banded.rounds_within(1e3, 100) == 12


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"delta": 0.0}, "delta=0.0 is out of range"),
    ({"delta": 1.0}, "delta=1.0 is out of range"),
    ({"multiplier": -1.0}, "noise multiplier=-1.0"),
    ({"rate": 0.0}, "rate=0.0"),
    ({"period": 0}, "period=0"),
    ({"noise": "gausian"}, "'gausian' is unknown. Did you mean 'gaussian'"),
    ({"accountant": "prv"}, "accountant='prv' is unknown.*gdp, pld, rdp"),
    ({"accountant": "gdp"}, "'gdp' is exact only .* sampling of rate 0.02"),
    (
      {"accountant": "gdp", "noise": "laplace", "rate": 1.0},
      "'gdp' is exact only .* Laplace noise",
    ),
    ({"accountant": "rdp", "noise": "laplace"}, "take 'pld'"),
    (
      {"noise": "laplace", "sensitivity": column_norms},
      "noise='laplace' cannot be correlated",
    ),
    (
      {"sensitivity": column_norms, "bands": None},
      "bands=None with sampling of rate 0.02",
    ),
    (
      {"sensitivity": column_norms, "bands": 3, "period": 2},
      "bands=3 .* give bands <= 2",
    ),
    ({"period": 2, "population": 9}, r"population=9 with period=2 .* None"),
    ({"independent": False, "population": 9}, r"population=9 .*=False: turns"),
    (
      {"sensitivity": column_norms, "bands": 2, "period": 2},
      "release.rounds=None",
    ),
  ],
)
def test_what_cannot_be_counted(fields, words):
  with pytest.raises(ValueError, match=words):
    ledger(**fields)


def test_wrong_kinds():
  with pytest.raises(TypeError, match="release is a float"):
    Ledger(1.0, Participation(0.1), 1e-5)  # type: ignore[arg-type]
  with pytest.raises(TypeError, match=r"participation is .*NoneType"):
    Ledger(release(), None, 1e-5)  # type: ignore[arg-type]
  with pytest.raises(TypeError, match=r"rounds=1\.5"):
    ledger().epsilon(1.5)
  with pytest.raises(ValueError, match="rounds=-1"):
    ledger().epsilon(-1)


def test_a_delta_below_rounding_errors():
  with pytest.raises(
    ValueError, match=r"delta=1e-12 is lost .* 1e-11, or .* 'rdp'"
  ):
    ledger(delta=1e-12).epsilon(100)
  assert 0 < ledger(delta=1e-12, accountant="rdp").epsilon(100) < math.inf


def test_the_ends_of_noise_are_counted():
  """By the chance of one pair's tail; a delta that is too small is refused."""
  tail = stats.ncx2.sf(draws.RADIUS**2, 2, 1.0)
  ours = ledger(1.0, 0.1)
  assert ours.exposure(50, 1) == pytest.approx(5 * tail)
  assert ours.exposure(50, 1_000_001) == pytest.approx(
    5 * (tail + 500_000 * 2.0**-64)
  )
  # A whole run of correlated noise is one release of all of its numbers.
  whole = ledger(1.0, 1.0, period=5, sensitivity=lambda n, period: 2.0)
  further = stats.ncx2.sf(draws.RADIUS**2, 2, 4.0)
  assert whole.exposure(20, 11) == pytest.approx(further, rel=1e-6)
  pure = ledger(2.0, 1.0, noise="laplace")
  assert pure.exposure(3, 1) == pytest.approx(3 * math.exp(0.5) * 2.0**-64)
  guard.check_ends(ours, 50, 10**6)
  with pytest.raises(
    ValueError, match=r"privacy.delta=1e-09: .* at least 4.5e-06"
  ):
    guard.check_ends(ledger(0.4, 1.0, delta=1e-9), 1000, 100)


def test_check_delta():
  assert accounting.check_delta(1e-3, 999) == 1e-3
  with pytest.raises(ValueError, match="give less than 1/1000 = 0.001"):
    accounting.check_delta(1e-3, 1000)
  with pytest.raises(ValueError, match=r"delta=-1\.0"):
    accounting.check_delta(-1.0, 10)


# --- what is told -------------------------------------------------------------


def test_a_sentence():
  text = ledger(1.0, 0.02, period=3, delta=1e-5).describe(30)
  epsilon = ledger(1.0, 0.02, period=3, delta=1e-5).told(30)
  assert text == (
    f"({epsilon:g}, 1e-05)-DP for leaving out what one client sends, the number"
    " of clients public, by PLD, Poisson sampling of rate 0.02, the seed"
    " secret, at most once in 3 rounds"
  )


def test_a_sentence_without_noise():
  told = "none: noise of less than 0.01 contributions is not counted as any"
  assert ledger(0.0).describe(3) == ledger(0.009).describe(3) == told


def test_facts_are_json():
  ours = ledger(1.0, 0.02)
  facts = json.loads(json.dumps(plain(ours.facts(7))))
  assert facts["epsilon"] == ours.told(7)
  assert type(ours.epsilon(7)) is float
  assert facts["adjacency"] == "zero-out"
  assert facts["rounds"] == 7
  assert plain(ledger(0.0).facts(1))["epsilon"] is None
