"""Robust aggregators on whole stacks: numpy, breakdown, shares, derivatives."""

import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.contract.outcome import Failed, Passed
from fedjax_sim.contract.part_checks import promises
from fedjax_sim.core import Shares
from problems import make_simulator, params_of, quadratic, quadratic_data, sgd
from robust_reference import REFERENCE
from tiers import slow_but

CLIENTS, HONEST = 9, 7
MADE = {
  "bulyan": lambda: aggregators.bulyan(f=1),
  "centered_clipping": lambda: aggregators.centered_clipping(radius=2.0),
  "dnc": lambda: aggregators.dnc(f=2, fraction=1.5),
  "geometric_median": aggregators.geometric_median,
  "krum": lambda: aggregators.krum(f=2),
  "multi_krum": lambda: aggregators.multi_krum(f=2, m=3),
  "norm_bounding": aggregators.norm_bounding,
  "trimmed_mean": lambda: aggregators.trimmed_mean(number=2),
}
OPTIONS: dict[str, dict[str, Any]] = {
  "bulyan": {"f": 1},
  "centered_clipping": {"radius": 2.0},
  "dnc": {"f": 2, "fraction": 1.5},
  "krum": {"f": 2},
  "multi_krum": {"f": 2, "m": 3},
  "trimmed_mean": {"number": 2},
}
# Withstand two of nine; bucketing two spoiled of five buckets.
WITHSTAND = [*MADE, "median", "bucketing"]
IN_RANGE = ("bulyan", "dnc", "krum", "median", "multi_krum", "trimmed_mean")


def made(name):
  if name == "bucketing":
    return aggregators.bucketing("median", size=2)
  return MADE[name]() if name in MADE else aggregators.AGGREGATORS[name]()


@functools.cache
def compiled(name):
  """Of the rows, split over leaves of one, two and no axes."""
  aggregator = made(name)

  @jax.jit
  def run(x, present, weights, rank, key):
    stack = {"a": x[:, :3], "b": x[:, 3:].reshape(-1, 1, 2, 1), "c": x[:, 0]}
    out = aggregators.aggregate(
      aggregator, stack, present, weights, rank=rank, key=key
    )
    return jnp.concatenate([out["a"], out["b"].ravel(), out["c"][None]])

  return run


def aggregate(name, x, present=None, weights=None, rank=None, seed=0):
  """Of updates with five coordinates; the result has the first one twice."""
  full = np.ones(len(x), bool) if present is None else present
  ones = np.ones(len(x), np.float32) if weights is None else weights
  ranks = np.arange(len(x), dtype=np.int32) if rank is None else rank
  key = jax.random.key(seed)
  found = compiled(name)(jnp.asarray(x), full, ones, ranks, key)
  assert found.dtype == jnp.float32
  return np.asarray(found)


def as_seen(x):
  return np.concatenate([x, x[:, :1]], axis=1).astype(np.float64)


def honest(seed=0, clients=CLIENTS):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(clients, 5)) + 3).astype(np.float32)


@pytest.mark.parametrize("name", MADE)
def test_an_aggregate_of_whom_is_there_is_numpys(name):
  for seed in range(12):
    rng = np.random.default_rng(seed)
    x, weights = honest(seed), rng.uniform(0.5, 3, CLIENTS).astype(np.float32)
    present = rng.permutation(CLIENTS) < 1 + seed % CLIENTS
    filled = np.where(present[:, None], x, np.nan)
    own = np.where(present, weights, np.nan).astype(np.float32)
    found = aggregate(name, filled, present, own)
    expected = REFERENCE[name](
      as_seen(x)[present], weights[present], **OPTIONS.get(name, {})
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("trimmed_mean", {"fraction": 0.34}),
    ("multi_krum", {"f": 1}),
    ("norm_bounding", {"factor": 0.5}),
  ],
)
def test_other_options_are_numpys_too(name, options):
  x, weights = honest(9), jnp.arange(1.0, CLIENTS + 1)
  aggregator = aggregators.AGGREGATORS[name](**options)
  expected = REFERENCE[name](x.astype(np.float64), weights, **options)
  run = jax.jit(lambda x: aggregators.aggregate(aggregator, x, None, weights))
  np.testing.assert_allclose(run(x), expected, rtol=1e-5)


def test_buckets_of_one_client_keep_its_weight():
  x, weights = honest(10), jnp.arange(1.0, CLIENTS + 1)
  single = aggregators.bucketing("norm_bounding", size=1)
  run = jax.jit(lambda x: aggregators.aggregate(single, x, None, weights))
  expected = REFERENCE["norm_bounding"](x.astype(np.float64), weights)
  np.testing.assert_allclose(run(x), expected, rtol=1e-5)


@pytest.mark.parametrize("there", [1, 2])
def test_a_median_of_the_largest_numbers_is_one(there):
  x = np.full((CLIENTS, 5), 3e38, np.float32)
  found = aggregate("median", x, np.arange(CLIENTS) < there)
  np.testing.assert_array_equal(found, np.float32(3e38))


FINITE = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)


@pytest.mark.parametrize("name", slow_but(["krum"], WITHSTAND))
@given(
  x=hnp.arrays(np.float32, (CLIENTS, 5), elements=FINITE),
  present=hnp.arrays(np.bool_, CLIENTS),
)
def test_finite_updates_never_give_nan(name, x, present):
  found = aggregate(name, np.where(present[:, None], x, np.nan), present)
  assert not np.isnan(found).any()


@pytest.mark.parametrize("name", WITHSTAND)
def test_clients_may_come_in_any_order(name):
  x, order = honest(1), np.random.default_rng(1).permutation(CLIENTS)
  x[4] = x[2]  # two that are equal
  ranks = order.astype(np.int32)
  np.testing.assert_allclose(
    aggregate(name, x[order], rank=ranks), aggregate(name, x), rtol=2e-5
  )


@pytest.mark.parametrize("name", ["bulyan", "krum", "multi_krum"])
def test_what_updates_have_in_common_costs_no_digits(name):
  x = (1000 + 0.05 * honest(2)).astype(np.float32)
  expected = REFERENCE[name](as_seen(x), None, **OPTIONS[name])
  np.testing.assert_allclose(aggregate(name, x), expected, rtol=1e-7)


@pytest.mark.parametrize("size", [1e6, 1e30, 3e38])
@pytest.mark.parametrize("name", WITHSTAND)
def test_two_of_nine_attackers_do_little(name, size):
  x = honest(3)
  x[3], x[6] = size, -size if name == "centered_clipping" else size
  good = as_seen(np.delete(x, [3, 6], axis=0))
  found = aggregate(name, x)
  if name in IN_RANGE:
    assert (found >= good.min(0) - 1e-5).all()
    assert (found <= good.max(0) + 1e-5).all()
  # No further from the honest mean than a few times the honest are.
  radius = np.linalg.norm(good - good.mean(0), axis=1).max()
  reach = {"norm_bounding": 3.0, "centered_clipping": 4.0}.get(name, 1.5)
  assert np.linalg.norm(found - good.mean(0)) <= reach * radius


@pytest.mark.parametrize(
  ("name", "attackers"),
  [
    ("trimmed_mean", 3),
    ("median", 5),
    ("geometric_median", 5),
    ("dnc", 5),
    ("krum", 6),  # so many that each has n - f - 2 of them as neighbors
    ("bucketing", 9),
  ],
)
def test_too_many_attackers_are_not_withstood(name, attackers):
  x = honest(4)
  x[:attackers] = 1e6
  good = as_seen(x[attackers:]).reshape(-1, 6)
  largest = np.abs(good).max(initial=10.0)
  assert np.abs(aggregate(name, x)).max() > 100 * largest


def test_the_geometric_median_minimizes_the_sum_of_distances():
  """Unit vectors to the updates, times weights, cancel out there."""
  x, weights = honest(5), np.arange(1.0, CLIENTS + 1)
  found = aggregators.aggregate(
    aggregators.geometric_median(steps=60),
    jnp.asarray(x),
    weights=jnp.asarray(weights, jnp.float32),
  )
  apart = x.astype(np.float64) - np.asarray(found)
  pull = weights @ (apart / np.linalg.norm(apart, axis=1)[:, None])
  assert np.linalg.norm(pull) < 1e-3 * weights.sum()


def test_bucketing_aggregates_means_over_some_grouping():
  """Every result is that of a grouping of five, and the key chooses it."""
  x = honest(6, clients=6)
  filled, present = x.copy(), np.arange(6) != 2
  filled[2] = np.nan
  rest = as_seen(x)[present]
  possible = {
    tuple(np.round(np.median(means, axis=0), 4))
    for order in itertools.permutations(range(5))
    for means in [
      [rest[list(order[i : i + 2])].mean(0) for i in range(0, 5, 2)]
    ]
  }
  drawn = [
    tuple(np.round(aggregate("bucketing", filled, present, seed=seed), 4))
    for seed in range(6)
  ]
  near = lambda one: min(np.abs(np.subtract(one, p)).max() for p in possible)
  assert max(map(near, drawn)) < 2e-4
  assert len({*drawn}) > 2


def promised(aggregator):
  setting: Any = types.SimpleNamespace(aggregator=aggregator)
  return promises(setting)


@pytest.mark.parametrize("name", slow_but(["bulyan"], WITHSTAND))
def test_devices_may_share_the_coordinates(name):
  if name == "centered_clipping":
    pytest.skip("it sums")
  outcome = promised(made(name))
  assert isinstance(outcome, Passed)


def test_an_aggregator_that_looks_at_its_own_share_alone_is_found():
  bounding = aggregators.norm_bounding()

  def finish(acc, weight, count, context):
    alone = context._replace(shares=Shares())
    return bounding.finish(acc, weight, count, alone)

  outcome = promised(bounding._replace(finish=finish))
  assert isinstance(outcome, Failed)
  assert "context.shares" in outcome.text


@pytest.mark.parametrize(
  "name", ["centered_clipping", "geometric_median", "norm_bounding"]
)
def test_derivatives_in_an_attackers_update_are_those_of_numpy(name):
  x, weights = honest(7).astype(np.float64), np.ones(CLIENTS)
  direction = np.arange(1.0, 6.0)
  options = OPTIONS.get(name, {})

  def value(own):
    return direction @ REFERENCE[name](
      np.array([*x[:-1], own]), weights, **options
    )

  own, step = 2 * x[-1], 1e-6
  numeric = [
    (value(own + step * e) - value(own - step * e)) / (2 * step)
    for e in np.eye(5)
  ]
  attacked = lambda own: jnp.dot(
    jnp.asarray(direction, jnp.float32),
    aggregators.aggregate(
      made(name), jnp.concatenate([jnp.asarray(x[:-1], jnp.float32), own[None]])
    ),
  )
  found = jax.grad(attacked)(jnp.asarray(own, jnp.float32))
  np.testing.assert_allclose(found, numeric, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("function", "options", "match"),
  [
    ("krum", {"f": -1}, "f=-1 is out of range"),
    ("krum", {"f": 1.5}, "f=1.5 is a float"),
    ("multi_krum", {"m": 0}, "m=0 is out of range"),
    ("trimmed_mean", {"fraction": 0.5}, "fraction=0.5 is out of range"),
    ("geometric_median", {"smoothing": 0}, "smoothing=0.0 is out of range"),
    ("centered_clipping", {"radius": 0}, "radius=0.0 is out of range"),
    ("norm_bounding", {"factor": -1.0}, "factor=-1.0 is out of range"),
    ("dnc", {"fraction": 0.0}, "fraction=0.0 is out of range"),
    ("bucketing", {"size": 0}, "size=0 is out of range"),
    ("bucketing", {"inner": "mean"}, "inner"),
    ("bucketing", {"inner": aggregators.mean()}, "keeps no stack"),
  ],
)
def test_options_out_of_range_are_refused(function, options, match):
  with pytest.raises((TypeError, ValueError), match=match):
    aggregators.AGGREGATORS[function](**options)


@pytest.mark.parametrize(
  ("aggregator", "needed"),
  [
    (aggregators.krum(f=2), 7),
    (aggregators.multi_krum(f=1, m=4), 7),
    (aggregators.multi_krum(m=4), 8),  # of 7, f = 2 leaves 3
    (aggregators.bulyan(f=1), 7),
    (aggregators.trimmed_mean(number=3), 7),
    (aggregators.bucketing("krum", size=2, f=1), 9),
  ],
)
def test_a_cohort_too_small_is_refused(aggregator, needed):
  task = quadratic(2)
  with pytest.raises(ValueError, match=f"cohorts of {needed} .* draws 6 at"):
    make_simulator(
      task,
      fedavg(task, sgd(1.0), sgd(1.0)),
      quadratic_data(np.eye(2)[[0, 1, 0, 1, 0, 1]]),
      aggregator=aggregator,
    )


def test_centered_clipping_goes_on_from_the_last_aggregate():
  """Three rounds; the last aggregate is a part of the state."""
  centers = honest(8, clients=4)
  task = quadratic(5)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.5), sgd(1.0)),
    quadratic_data(centers),
    aggregator=aggregators.centered_clipping(radius=0.7),
    lanes=2,
    devices=2,
  )
  state, w, v = simulator.init(), np.zeros(5), np.zeros(5)
  for round_ in range(3):
    state = simulator.states.to_devices(simulator.states.to_host(state))
    state = simulator.dispatch(state, simulator.plan(round_, 1)).state
    updates = 0.5 * (centers - w)
    v = REFERENCE["centered_clipping"](updates, None, radius=0.7, center=v)
    w = w + v
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, rtol=1e-5)
  np.testing.assert_allclose(state.aggregate["w"], v, rtol=1e-5)
