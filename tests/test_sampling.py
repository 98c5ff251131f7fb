"""Samplers: cohorts by (seed, round), with the probabilities they promise."""

import collections
import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.sampling import (
  SAMPLERS,
  Participation,
  by_size,
  cyclic,
  cyclic_poisson,
  poisson,
  shuffled,
  stratified,
  uniform,
)

SEEDS = st.integers(0, 2**32 - 1)
ROUNDS = st.integers(0, 2**31 - 1)
SHAPES = st.integers(1, 300).flatmap(
  lambda n: st.tuples(st.just(n), st.integers(1, n))
)
MEMORYLESS = ("uniform", "poisson")  # no round knows of another


def of_groups(num_clients, size):
  """`cyclic_poisson` with as many groups as there can be."""
  return cyclic_poisson(num_clients, size, num_clients // size)


def of_sizes(num_clients, size):
  """`by_size` of clients some of which have many examples."""
  sizes = np.arange(num_clients) % 7 * 10 + 1
  return by_size(num_clients, size, sizes)


def of_strata(num_clients, size):
  sizes = 1 + np.arange(num_clients) % 7
  return stratified(num_clients, size, np.zeros(()), sizes, by="sizes")


ALL = SAMPLERS | {
  "cyclic_poisson": of_groups,
  "by_size": of_sizes,
  "stratified": of_strata,
}
del ALL["available"]  # it needs a trace; see test_availability.py
# These have a state; see test_observing.py and test_participation.py.
del ALL["power_of_choice"], ALL["importance"]


def included(sampler, num_clients, rounds, seed=0):
  """Who took part, shape=(rounds, num_clients), bool."""
  taken = np.zeros((rounds, num_clients), bool)
  for round_ in range(rounds):
    taken[round_, sampler.sample(seed, round_)] = True
  return taken


def spread(counts, expected, variance):
  """Where the counts' spread lies in its distribution, 0 to 1.

  Args:
    counts: of several events.
    expected: mean of each.
    variance: of each.
  """
  statistic = np.sum((counts - expected) ** 2 / variance)
  return scipy.stats.chi2.cdf(statistic, len(counts))


# --- all ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@given(seed=SEEDS, round_=ROUNDS, shape=SHAPES)
def test_a_cohort_has_no_duplicates_and_is_reproducible(
  name, seed, round_, shape
):
  num_clients, size = shape
  sampler = ALL[name](num_clients, size)
  ids = sampler.sample(seed, round_)
  assert ids.dtype == np.int64
  assert ids.shape == (len(ids),)
  assert len(np.unique(ids)) == len(ids) <= sampler.sizes[-1]
  assert np.all((ids >= 0) & (ids < num_clients))
  np.testing.assert_array_equal(
    ALL[name](num_clients, size).sample(seed, round_), ids
  )
  versions = sampler.versions(seed, round_, ids)
  assert versions.dtype == np.int64
  assert versions.shape == ids.shape
  assert np.all((versions >= 0) & (versions <= (name == "in_flight")))


@pytest.mark.parametrize("name", MEMORYLESS)
def test_cohorts_differ_over_rounds_and_seeds(name):
  sampler = SAMPLERS[name](1000, 20)
  cohorts = {
    tuple(sampler.sample(seed, round_))
    for seed in (0, 1, 2**32 - 1)
    for round_ in (0, 1, 2, 2**31 - 1)
  }
  assert len(cohorts) == 12
  # Neighboring rounds and seeds share no more than chance gives them.
  taken = included(sampler, 1000, 400)
  assert abs(np.sum(taken[1:] & taken[:-1]) / 399 - 0.4) < 0.12
  other = included(sampler, 1000, 400, seed=1)
  assert abs(np.sum(taken & other) / 400 - 0.4) < 0.12


@pytest.mark.parametrize("name", MEMORYLESS)
def test_every_client_is_as_likely(name):
  num_clients, size, rounds = 40, 10, 4000
  taken = included(SAMPLERS[name](num_clients, size), num_clients, rounds)
  rate = size / num_clients
  variance = rounds * rate * (1 - rate)
  if name == "uniform":  # counts have a fixed sum, so one degree less
    variance *= num_clients / (num_clients - 1)
  where = spread(taken.sum(0), rounds * rate, variance)
  assert 0.001 < where < 0.999


# --- uniform ------------------------------------------------------------------


def test_uniform_draws_every_subset_as_often():
  rounds = 6000
  sampler = uniform(5, 3)
  assert sampler.sizes == (3,)
  assert sampler.expected == 3
  subsets = list(itertools.combinations(range(5), 3))
  counts = collections.Counter(
    tuple(sampler.sample(3, round_).tolist()) for round_ in range(rounds)
  )
  assert set(counts) == set(subsets)
  assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.001


def test_uniform_can_take_everybody():
  np.testing.assert_array_equal(uniform(7, 7).sample(0, 5), np.arange(7))


@pytest.mark.parametrize(
  ("num_clients", "size", "error", "match"),
  [
    (10, 11, ValueError, r"clients_per_round=11 exceeds the 10 .* at most 10"),
    (10, 0, ValueError, "clients_per_round=0 is out of range"),
    (10, -1, ValueError, "clients_per_round=-1 is out of range"),
    (10, 2.0, TypeError, "clients_per_round=2.0 is a float"),
    (10, True, TypeError, "clients_per_round=True is a bool"),
    (0, 1, ValueError, "num_clients=0 is out of range"),
  ],
)
def test_uniform_refuses(num_clients, size, error, match):
  with pytest.raises(error, match=match):
    uniform(num_clients, size)


# --- poisson ------------------------------------------------------------------


def test_uniform_draws_every_size_as_often():
  sampler = uniform(9, 6, min_clients=3)
  assert sampler.sizes == (6,)
  assert sampler.expected == 4.5
  rounds = 4000
  taken = included(sampler, 9, rounds)
  counts = np.bincount(taken.sum(1), minlength=10)
  assert not counts[:3].any()
  assert not counts[7:].any()
  share = rounds / 4
  assert spread(counts[3:7], share, share) < 0.999
  every = taken.sum(0)
  assert np.all(np.abs(every - rounds * 4.5 / 9) < 5 * np.sqrt(rounds / 4))


def test_uniform_refuses_a_least_beyond_the_most():
  wrong: list[tuple[Any, type]] = [
    (0, ValueError),
    (7, ValueError),
    (2.5, TypeError),
  ]
  for least, error in wrong:
    with pytest.raises(error, match="min_clients"):
      uniform(9, 6, min_clients=least)


def test_poisson_cohorts_are_binomial():
  num_clients, rate, rounds = 60, 0.3, 5000
  sampler = poisson(num_clients, rate * num_clients)
  assert sampler.expected == rate * num_clients
  sizes = included(sampler, num_clients, rounds).sum(1)
  variance = num_clients * rate * (1 - rate)
  assert abs(sizes.mean() - sampler.expected) < 4 * np.sqrt(variance / rounds)
  assert abs(sizes.var() / variance - 1) < 4 * np.sqrt(2 / rounds)
  law = scipy.stats.binom(num_clients, rate)
  edges = law.ppf(np.linspace(0, 1, 9)[1:-1])  # bins of about 1/8
  bins = np.searchsorted(edges, sizes)
  upper = law.cdf(np.append(edges, num_clients))
  expected = np.diff(upper, prepend=0) * rounds
  observed = np.bincount(bins, minlength=8)
  assert scipy.stats.chisquare(observed, expected).pvalue > 0.001


def test_poisson_takes_clients_independently():
  """Every combination of three clients comes as often as by three coins."""
  rate, rounds = 0.4, 6000
  taken = included(poisson(3, 3 * rate), 3, rounds)
  codes = taken @ np.array([1, 2, 4])
  ones = np.array([int(c).bit_count() for c in range(8)])
  expected = rounds * rate**ones * (1 - rate) ** (3 - ones)
  observed = np.bincount(codes, minlength=8)
  assert scipy.stats.chisquare(observed, expected).pvalue > 0.001


@pytest.mark.parametrize(
  ("num_clients", "expected"), [(1000, 1), (200, 30.5), (50, 50), (3, 0.1)]
)
def test_poisson_compiles_for_few_sizes_that_hold_every_cohort(
  num_clients, expected
):
  sampler = poisson(num_clients, expected)
  sizes = sampler.sizes
  assert 1 <= len(sizes) <= 3
  assert list(sizes) == sorted(set(sizes))
  drawn = np.array([len(sampler.sample(1, r)) for r in range(10_000)])
  assert drawn.max() <= sizes[-1] <= num_clients
  assert np.mean(drawn > sizes[0]) < 1e-3
  if len(sizes) > 1:
    assert drawn.max() <= sizes[1]
  law = scipy.stats.binom(num_clients, expected / num_clients)
  assert law.sf(sizes[0]) < 1e-3  # the smallest is for nearly all rounds
  assert sizes[0] <= law.isf(1e-9) + 2  # and not wastefully large


def test_poisson_with_certainty_takes_everybody():
  np.testing.assert_array_equal(poisson(4, 4).sample(0, 1), np.arange(4))


@pytest.mark.parametrize(
  ("expected", "error", "match"),
  [
    (0.0, ValueError, r"clients_per_round=0.0 .* > 0 and <= 10"),
    (-1, ValueError, "clients_per_round=-1.0 is out of range"),
    (10.5, ValueError, r"clients_per_round=10.5 .*<= 10"),
    (float("nan"), ValueError, "clients_per_round=nan is out of range"),
    ("3", TypeError, "clients_per_round='3' is a str"),
  ],
)
def test_poisson_refuses(expected, error, match):
  with pytest.raises(error, match=match):
    poisson(10, expected)


# --- groups that take turns ---------------------------------------------------


@pytest.mark.parametrize("name", ["cyclic", "cyclic_poisson"])
@given(seed=SEEDS, first=st.integers(0, 2**30), shape=SHAPES)
def test_nobody_takes_part_twice_within_a_period(name, seed, first, shape):
  """From any round on, as a run that goes on begins."""
  num_clients, size = shape
  sampler = ALL[name](num_clients, size)
  assert sampler.participation is not None
  period = sampler.participation.period
  last: dict[int, int] = {}
  for round_ in range(first, first + min(3 * period, 60)):
    for client in sampler.sample(seed, round_).tolist():
      assert round_ - last.get(client, -period) >= period
      last[client] = round_


@given(seed=SEEDS, epoch=st.integers(0, 1000), shape=SHAPES)
def test_cyclic_takes_everybody_once_an_epoch(seed, epoch, shape):
  num_clients, size = shape
  sampler = cyclic(num_clients, size)
  assert sampler.participation is not None
  period = sampler.participation.period
  assert sampler.participation == Participation(1.0, period, False)
  assert sampler.expected == num_clients / period
  cohorts = [
    sampler.sample(seed, epoch * period + turn) for turn in range(period)
  ]
  assert sorted(np.concatenate(cohorts).tolist()) == list(range(num_clients))
  sizes = {len(ids) for ids in cohorts}
  assert sampler.sizes == (max(sizes),)
  assert max(sizes) <= size
  assert max(sizes) - min(sizes) <= 1
  np.testing.assert_array_equal(
    sampler.sample(seed, (epoch + 1) * period), cohorts[0]
  )


@pytest.mark.parametrize("name", ["cyclic", "cyclic_poisson"])
def test_a_cohort_is_nobody_elses_to_change(name):
  sampler = ALL[name](4, 2)
  before = sampler.sample(0, 0).copy()
  sampler.sample(0, 0)[:] = -1
  np.testing.assert_array_equal(sampler.sample(0, 0), before)


def test_the_order_is_the_seeds():
  """Every way to split six clients in two comes as often."""
  sampler = cyclic(6, 3)
  counts = collections.Counter(
    tuple(sampler.sample(seed, 0).tolist()) for seed in range(6000)
  )
  assert set(counts) == set(itertools.combinations(range(6), 3))
  assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.001


def test_cyclic_poisson_with_certainty_is_cyclic():
  for round_ in range(7):
    np.testing.assert_array_equal(
      cyclic_poisson(12, 4, groups=3).sample(5, round_),
      cyclic(12, 4).sample(5, round_),
    )


def test_cyclic_poisson_keeps_its_rate():
  """In its group's turn a client takes part by itself; groups are uneven."""
  num_clients, groups, epochs = 11, 3, 4000
  sampler = cyclic_poisson(num_clients, 2, groups)
  rate = 2 / (num_clients / groups)
  assert sampler.participation == Participation(rate, groups, True)
  assert sampler.expected == 2
  taken = included(sampler, num_clients, epochs * groups)
  by_turn = taken.reshape(epochs, groups, num_clients)
  turns = by_turn.any(0)
  np.testing.assert_array_equal(turns.sum(0), np.ones(num_clients))
  assert sorted(turns.sum(1).tolist()) == [3, 4, 4]
  variance = epochs * rate * (1 - rate)
  assert 0.001 < spread(taken.sum(0), epochs * rate, variance) < 0.999
  for turn in range(groups):  # all combinations of a group, as by coins
    members = by_turn[:, turn, turns[turn]]
    size = members.shape[1]
    codes = members @ (1 << np.arange(size))
    ones = np.array([code.bit_count() for code in range(1 << size)])
    expected = epochs * rate**ones * (1 - rate) ** (size - ones)
    observed = np.bincount(codes, minlength=1 << size)
    assert scipy.stats.chisquare(observed, expected).pvalue > 0.001


def test_over_seeds_a_first_cohort_is_as_likely_as_its_likes():
  seeds = 4000
  sampler = cyclic_poisson(4, 1, 2)
  counts = collections.Counter(
    tuple(sampler.sample(seed, 0).tolist()) for seed in range(seeds)
  )
  # A pair is one of six with 1/4; one client, of the pair with it, with 1/4.
  pairs = list(itertools.combinations(range(4), 2))
  chances: dict[tuple[int, ...], float] = {(): 0.25}
  chances |= {(i,): 1 / 8 for i in range(4)} | dict.fromkeys(pairs, 1 / 24)
  observed = [counts[who] for who in chances]
  assert sum(observed) == seeds
  expected = np.array(list(chances.values())) * seeds
  assert scipy.stats.chisquare(observed, expected).pvalue > 0.001


@pytest.mark.parametrize(
  ("num_clients", "expected", "groups"), [(1000, 5, 10), (203, 10.5, 4)]
)
def test_cyclic_poisson_compiles_for_sizes_of_a_group(
  num_clients, expected, groups
):
  sampler = cyclic_poisson(num_clients, expected, groups)
  largest = -(-num_clients // groups)
  sizes = sampler.sizes
  assert list(sizes) == sorted(set(sizes))
  assert len(sizes) <= 3
  assert sizes[-1] == largest
  drawn = np.array([len(sampler.sample(1, r)) for r in range(5000)])
  assert np.mean(drawn > sizes[0]) < 1e-3


@pytest.mark.parametrize(
  ("arguments", "error", "match"),
  [
    ((10, 11), ValueError, "clients_per_round=11 is out of range"),
    ((10, 0), ValueError, "clients_per_round=0 is out of range"),
    ((10, 2.0), TypeError, "clients_per_round=2.0 is a float"),
  ],
)
def test_cyclic_refuses(arguments, error, match):
  with pytest.raises(error, match=match):
    cyclic(*arguments)


@pytest.mark.parametrize(
  ("arguments", "error", "match"),
  [
    ((10, 2, 0), ValueError, "groups=0 is out of range"),
    ((10, 2, 11), ValueError, "groups=11 .* from 1 to 10"),
    ((10, 2, 2.0), TypeError, "groups=2.0 is a float"),
    ((10, 0.0, 2), ValueError, r"clients_per_round=0.0 .* > 0"),
    ((10, 4, 3), ValueError, r"clients_per_round=4 exceeds the 3.33333 of 10"),
  ],
)
def test_cyclic_poisson_refuses(arguments, error, match):
  with pytest.raises(error, match=match):
    cyclic_poisson(*arguments)


# --- shuffled, and by size ----------------------------------------------------


@given(seed=SEEDS, shape=SHAPES)
def test_nobody_takes_part_twice_before_all_did_once(seed, shape):
  num_clients, size = shape
  sampler = shuffled(num_clients, size)
  period = -(-num_clients // size)
  for turn in range(3):
    rounds = range(turn * period, (turn + 1) * period)
    taken = np.concatenate([sampler.sample(seed, r) for r in rounds])
    np.testing.assert_array_equal(np.sort(taken), np.arange(num_clients))


def test_every_turn_has_an_order_of_its_own():
  sampler = shuffled(100, 10)
  first = [tuple(sampler.sample(0, 10 * turn)) for turn in range(5)]
  assert len(set(first)) == 5


@pytest.mark.parametrize("clients", [6, 60])
def test_clients_are_drawn_in_proportion_to_their_examples(clients):
  """Pairs follow successive sampling; both ways to draw them."""
  sizes = np.ones(clients, np.int64)
  sizes[:4] = clients * np.array([1, 2, 3, 9])
  p = sizes / sizes.sum()
  chance = np.outer(p, p) * (1 / (1 - p)[:, None] + 1 / (1 - p)[None, :])
  sampler, rounds = by_size(clients, 2, sizes), 4000
  pairs = [tuple(sampler.sample(0, r)) for r in range(rounds)]
  assert all(a < b for a, b in pairs)
  among = [(a, b) for a in range(4) for b in range(a + 1, 4)]
  expected = np.array([chance[pair] for pair in among])
  counts = np.array([pairs.count(pair) for pair in among])
  counts = np.append(counts, rounds - counts.sum())
  expected = rounds * np.append(expected, 1 - expected.sum())
  assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_one_client_with_nearly_all_examples():
  sizes = np.ones(1000, np.int64)
  sizes[7] = 10**12
  ids = by_size(1000, 20, sizes).sample(3, 5)
  assert 7 in ids
  assert len(np.unique(ids)) == 20


@pytest.mark.parametrize(
  ("sizes", "message"),
  [([1, 2], r"shape \(2,\) for 3"), ([1, 0, 2], r"or one below 1")],
)
def test_sizes_that_cannot_be_drawn_by(sizes, message):
  with pytest.raises(ValueError, match=message):
    by_size(3, 1, np.array(sizes))


def test_a_population_chosen_in_advance():
  """The rate is that of the population, however many clients there are."""
  for clients in (90, 91):
    sampler = poisson(clients, 45, population=90)
    assert sampler.participation == Participation(0.5, 1, True, 90)
    assert sampler.expected == clients / 2
    drawn = [len(sampler.sample(0, r)) for r in range(400)]
    assert abs(np.mean(drawn) - clients / 2) < 5 * np.sqrt(clients / 4 / 400)
  with pytest.raises(ValueError, match=r"server.clients_per_round=45"):
    poisson(90, 45, population=40)
