"""Which two federations an epsilon holds for, against what they betray.

Two federations whose clients are chosen to be told apart: the densities of
their noisy sums are mixtures, in closed form, over who takes part. Rounds are
composed here by FFT, on a grid that rounds losses down, so that what is found
is what an attacker attains: no bound may be below it.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import fft, linalg, optimize, stats

from fedjax_sim.core import PrivacySpec
from fedjax_sim.privacy.accounting import Ledger
from fedjax_sim.privacy.central.factorization import banded
from fedjax_sim.sampling import Participation, poisson

_X = np.linspace(-60.0, 60.0, 240_001)


def promised(sampler) -> Participation:
  assert sampler.participation is not None
  return sampler.participation


def density(chances, spread, noise="gaussian", x=_X):
  """Of a sum with so much noise; `chances`: sum without noise -> chance."""
  draws = {"gaussian": stats.norm.pdf, "laplace": stats.laplace.pdf}[noise]
  return sum(c * draws(x, loc=s, scale=spread) for s, c in chances.items())


def attained(p, q, delta, rounds=1, x=_X, interval=None):
  """The epsilon that the likelihood ratio betrays after so many rounds."""
  kept = (p > 1e-290) & (q > 1e-290)
  mass = p[kept] * (x[1] - x[0])
  interval = interval or (1e-4 if rounds < 100 else 2e-5)
  loss = np.floor(np.log(p[kept] / q[kept]) / interval).astype(int)
  first = loss.min()
  masses = np.bincount(loss - first, mass)
  spread = math.sqrt(np.cov(loss, aweights=mass)) if rounds > 1 else 0
  length = len(masses) + int(40 * spread * math.sqrt(rounds))
  points = fft.next_fast_len(length)
  centre = int(np.average(loss - first, weights=mass)) * rounds
  composed = fft.irfft(fft.rfft(masses, points) ** rounds, points)
  if rounds > 1:  # places are modulo `points`; put the mean in the middle
    composed = np.roll(composed, points // 2 - centre % points)
    start = first * rounds + centre - points // 2
  else:
    start = first
  losses = interval * (start + np.arange(points))
  composed = np.maximum(composed, 0)

  def excess(epsilon):
    with np.errstate(over="ignore"):
      beyond = np.maximum(-np.expm1(epsilon - losses), 0)
    return float(beyond @ composed) - delta

  return optimize.brentq(excess, 0, losses[-1]) if excess(0) > 0 else 0.0


def cohorts(values, size):
  """The sums of all cohorts of so many clients, and their chances."""
  sums: dict[float, float] = {}
  drawn = list(itertools.combinations(values, size))
  for cohort in drawn:
    total = float(sum(cohort))
    sums[total] = sums.get(total, 0) + 1 / len(drawn)
  return sums


def test_the_attack_itself_is_right():
  """Gaussian noise without sampling, in closed form."""
  p, q = density({1.0: 1.0}, 5.0), density({0.0: 1.0}, 5.0)
  for rounds in (1, 40):
    mu = math.sqrt(rounds) / 5
    epsilon = attained(p, q, 1e-3, rounds)
    low, high = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    delta = stats.norm.cdf(low) - math.exp(epsilon) * stats.norm.cdf(high)
    assert delta == pytest.approx(1e-3, rel=0.02)


# --- cohorts of a fixed size, in turns ----------------------------------------


def test_a_cohort_of_a_fixed_size_in_turns_is_none_of_poisson():
  """One of a hundred is drawn in its turn, and the others send the opposite.

  Counted as Poisson sampling this was 0.364. That nothing is sent already
  betrays 3.32, and that somebody else is there 4.285.
  """
  ours = Ledger(
    PrivacySpec("gaussian", 1.0), Participation(0.01, 2, False), 1e-6
  )
  x = np.linspace(-12.0, 16.0, 500_001)
  others = [-1.0] * 99
  there, silent, other = (
    density(cohorts([one, *others], 1), 1.0, x=x) for one in (1.0, 0.0, -1.0)
  )
  zero_out = attained(there, silent, 1e-6, x=x)
  replaced = attained(there, other, 1e-6, x=x)
  assert zero_out == pytest.approx(3.3203, abs=1e-3)
  assert replaced == pytest.approx(4.2854, abs=1e-3)
  assert ours.adjacency == "replace-one"
  assert max(zero_out, replaced) <= ours.epsilon(2) < replaced * 1.001
  assert ours.epsilon(3) > ours.epsilon(2)  # a second turn


@pytest.mark.parametrize(
  ("noise", "period", "clients", "size"),
  [
    ("gaussian", 3, 4, 1),
    ("gaussian", 3, 6, 5),
    ("gaussian", 1, 3, 3),
    ("laplace", 3, 4, 1),
    ("laplace", 1, 4, 2),
  ],
)
def test_no_bound_of_a_fixed_size_is_below_what_is_betrayed(
  noise, period, clients, size
):
  """One client is replaced by another; all sums of cohorts are enumerated."""
  spread, delta = 4.0, 1e-4
  part = Participation(size / clients, period)
  ours = Ledger(PrivacySpec(noise, spread), part, delta)
  assert ours.adjacency == "replace-one"
  others = [-1.0] * (clients - 1)
  p, q = (
    density(cohorts([one, *others], size), spread, noise) for one in (1.0, -1.0)
  )
  for turns in (1, 12):
    both = [attained(*pair, delta, turns) for pair in ((p, q), (q, p))]
    rounds = turns * period
    assert 0 < max(both) <= ours.epsilon(rounds)
    assert ours.epsilon(rounds) == ours.epsilon(rounds - period + 1)
    if size == 1 and turns == 1:  # the others are as far as can be
      assert max(both) == pytest.approx(ours.epsilon(rounds), rel=0.01)


# --- Poisson sampling of m of n -----------------------------------------------


def binomial(count, rate, value=1.0):
  """Sums of so many clients that are drawn by themselves and send `value`."""
  chances = stats.binom.pmf(np.arange(count + 1), count, rate)
  return {value * i: float(c) for i, c in enumerate(chances)}


def joined(one, other):
  """The sums of two groups."""
  result: dict[float, float] = {}
  for (a, p), (b, q) in itertools.product(one.items(), other.items()):
    result[a + b] = result.get(a + b, 0.0) + p * q
  return result


def normal(chances, spread, centre):
  """The density of sums far from 0, about a centre."""
  near = {s - centre: c for s, c in chances.items() if c > 1e-30}
  return density(near, spread, x=_WIDE)


_WIDE = np.linspace(-200.0, 200.0, 10_001)


def betrayed(with_one, without, rounds, spread, delta):
  """Either way, whichever is more."""
  p, q = (normal(sums, spread, 45.0) for sums in (with_one, without))
  return max(
    attained(*pair, delta, rounds, x=_WIDE) for pair in ((p, q), (q, p))
  )


def test_one_more_client_changes_the_rates_of_all():
  """45 of 90 are drawn, or 45 of 91 of whom the last sends the opposite."""
  rounds, spread, delta = 1000, 20.0, 1e-3
  release = PrivacySpec("gaussian", spread)
  follows = Ledger(release, promised(poisson(90, 45)), delta)
  claimed = follows.epsilon(rounds)
  assert claimed == pytest.approx(2.36, abs=0.005)

  there = joined(binomial(90, 45 / 91), binomial(1, 45 / 91, -1.0))
  added = betrayed(there, binomial(90, 0.5), rounds, spread, delta)
  assert added == pytest.approx(5.32, abs=0.015)
  assert added > claimed
  assert "adding" not in follows.describe(rounds)
  assert (
    "leaving out what one client sends, the number of clients public"
    in follows.describe(rounds)
  )

  sends = joined(binomial(89, 0.5), binomial(1, 0.5, -1.0))
  silent = joined(binomial(89, 0.5), {0.0: 1.0})
  zero_out = betrayed(sends, silent, rounds, spread, delta)
  assert 0.9 * claimed < zero_out <= claimed


def test_a_rate_that_was_fixed_in_advance_is_nobody_elses():
  """Then one client more or less betrays no more than is claimed."""
  rounds, spread, delta = 1000, 20.0, 1e-3
  for clients in (90, 91):  # neighbors are told the same
    part = promised(poisson(clients, 45, population=90))
    ours = Ledger(PrivacySpec("gaussian", spread), part, delta)
    assert ours.adjacency == "add-or-remove"
    assert ours.epsilon(rounds) == pytest.approx(2.36, abs=0.005)
    assert "adding or removing one client," in ours.describe(rounds)
  there = joined(binomial(90, 0.5), binomial(1, 0.5, -1.0))
  added = betrayed(there, binomial(90, 0.5), rounds, spread, delta)
  assert 0.9 * ours.epsilon(rounds) < added <= ours.epsilon(rounds)


# --- correlated noise, of every way to take part ------------------------------


@pytest.mark.parametrize(
  ("part", "moved", "rounds_of_one", "turns"),
  [
    (Participation(1.0, 1, False), 2.0, [0, 1, 2, 3, 4, 5], 1),
    (Participation(1.0, 1, True), 1.0, [0, 1, 2, 3, 4, 5], 1),
    (Participation(1.0, 3, False), 1.0, [0, 3], 1),
    (Participation(1.0, 3, True), 1.0, [0, 3], 1),
    (Participation(0.25, 2, True), 1.0, [0], 3),
    (Participation(0.25, 2, False), 2.0, [0], 3),
    (Participation(0.25, 3, False), 2.0, [0], 2),
  ],
)
def test_no_bound_of_banded_noise_is_below_what_is_betrayed(
  part, moved, rounds_of_one, turns
):
  """What a client adds to six releases, through the matrix itself.

  Without sampling in all of its rounds at once; with it a draw for each turn,
  whose columns do not overlap.
  """
  strategy = banded(6, 2)
  release = PrivacySpec(
    "gaussian", 3.0, strategy.sensitivity, strategy.bands, strategy.rounds
  )
  ours = Ledger(release, part, 1e-4)
  matrix = linalg.toeplitz(strategy.coefficients, np.zeros(6))
  shift = moved * float(np.linalg.norm(matrix[:, rounds_of_one].sum(axis=1)))
  silent = density({0.0: 1.0}, 3.0)
  sent = density({0.0: 1 - part.rate, shift: part.rate}, 3.0)
  both = [
    attained(*way, 1e-4, turns) for way in ((sent, silent), (silent, sent))
  ]
  assert 0.95 * ours.epsilon(6) <= max(both) <= ours.epsilon(6)
