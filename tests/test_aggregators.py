"""Aggregators against numpy, through real rounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import robust_reference
from fedjax_sim import aggregators, sampling
from fedjax_sim.aggregators import AGGREGATORS
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import AggregationContext, Purpose, Requirements, key_for
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_log import combine
from problems import make_simulator, params_of, quadratic, sgd
from tiers import slow_but

# Client k has SIZES[k] copies of CENTRES[k], so its update is exactly that, and
# its weight is its size. Multiples of 1/8 and powers of 2: sums are exact.
SIZES = np.array([1, 4, 2, 8, 1, 2, 4, 1])
CENTRES = np.random.default_rng(0).integers(-40, 40, (8, 3)) / 8
NOT_FINITE = 8  # one more client, whose update overflows
REFERENCE = {
  "weighted_mean": lambda x, w: np.average(x, axis=0, weights=w),
  "mean": lambda x, w: x.mean(0),
  "sum": lambda x, w: x.sum(0),
  "median": lambda x, w: np.median(x, axis=0),
  "stack": lambda x, w: np.average(x, axis=0, weights=w),
  **robust_reference.REFERENCE,
}
NAMES = [*REFERENCE]  # bucketing draws; tests/test_robust.py
KINDS = ("weighted_mean", "mean", "sum", "median", "stack")
COHORTS = ([0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 4, 5, 7], [3, 6], [2], [0, 4, 7])


def copies():
  centres = np.concatenate([CENTRES, np.full((1, 3), 1e30)])
  sizes = np.append(SIZES, 1)
  curvatures = np.append(np.ones(8), 1e30)
  train = FederatedData(
    examples={
      "x": np.repeat(centres, sizes, axis=0).astype(np.float32),
      "a": np.repeat(curvatures, sizes).astype(np.float32),
    },
    offsets=np.append(0, np.cumsum(sizes)),
  )
  return FederatedDataset(
    name="copies", train=train, num_classes=0, example_shape=(3,)
  )


def simulator_of(name, lanes, devices, ids):
  """`ids` is a list that holds the next cohort."""
  task = quadratic(3)
  algorithm = fedavg(task, sgd(1.0), sgd(1.0))
  if name == "stack":

    def apply(server, aggregate, context):
      update = combine(aggregate.update, aggregate.members.weight)
      joined = aggregate._replace(update=update)
      return fedavg(task, sgd(1.0), sgd(1.0)).apply(server, joined, context)

    algorithm = algorithm._replace(
      apply=apply, requirements=Requirements(all_updates=True)
    )

  def finish(client, carry):
    """An absent lane, which has no examples, reports nothing but NaN."""
    nothing = 0.0 / client.num_examples
    report = algorithm.finish(client, carry)
    return report._replace(
      update=jax.tree.map(lambda u: u + nothing, report.update),
      weight=report.weight + nothing,
    )

  return make_simulator(
    task,
    algorithm._replace(finish=finish),
    copies(),
    batching=LocalBatching(batch_size=8),
    lanes=lanes,
    devices=devices,
    aggregator=AGGREGATORS[name](),
    sampler=sampling.Sampler(
      sample=lambda seed, round_: np.array(ids, np.int64),
      sizes=(9,),
      expected=9.0,
    ),
  )


@pytest.mark.parametrize(
  ("name", "lanes", "devices"),
  [
    *slow_but(
      [(name, 3, 2) for name in (*KINDS, "krum")],
      [(name, 3, 2) for name in NAMES],
    ),
    pytest.param("geometric_median", 3, 1, marks=pytest.mark.slow),
    pytest.param("krum", 1, 1, marks=pytest.mark.slow),
    pytest.param("median", 1, 1, marks=pytest.mark.slow),
    pytest.param("median", 3, 1, marks=pytest.mark.slow),
    ("weighted_mean", 1, 1),
  ],
)
def test_an_aggregate_is_what_numpy_says(name, lanes, devices):
  ids: list[int] = []
  simulator = simulator_of(name, lanes, devices, ids)
  start = simulator.init()
  for cohort in COHORTS:
    expected = REFERENCE[name](CENTRES[cohort], SIZES[cohort])
    for broken in ([], [NOT_FINITE]):
      ids[:] = [*broken, *cohort]
      out = simulator.dispatch(start, simulator.plan(0, 1))
      assert out.rows[0]["clients"] == len(cohort)
      assert out.rows[0]["clients_rejected"] == len(broken)
      found = params_of(simulator, out.state)["w"]
      if name == "median":
        np.testing.assert_array_equal(found, expected.astype(np.float32))
      else:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def randomly_weighted(kind):
  """The sum of updates, each times a random number of its client's own."""

  def times(context, x):
    chance = lambda rank: jax.random.uniform(
      jax.random.fold_in(context.key, rank)
    )
    factors = context.hparams["scale"] * jax.vmap(chance)(context.rank)
    return factors.reshape(-1, *(1,) * (x.ndim - 1)) * x

  if kind == "sum":
    plain = aggregators.sum_()

    def add(acc, updates, weights, present, context):
      updates = jax.tree.map(lambda x: times(context, x), updates)
      return plain.add(acc, updates, weights, present, context)

    return plain._replace(add=add, hparams={"scale": 2.0})

  plain = aggregators.stack()

  def finish(acc, weight, count, context):
    rows = plain.finish(acc, weight, count, context)
    return jax.tree.map(lambda x: jnp.sum(times(context, x), axis=0), rows)

  return plain._replace(
    finish=finish,
    reduces=True,
    coordinatewise=kind == "coordinatewise",
    hparams={"scale": 2.0},
  )


RANDOM = ["sum", "stack", "coordinatewise"]


@pytest.mark.parametrize(
  ("lanes", "devices", "kind"),
  slow_but(
    [(3, 2, kind) for kind in RANDOM],
    [(n, m, kind) for n, m in [(1, 1), (3, 2)] for kind in RANDOM],
  ),
)
def test_random_numbers_of_clients_depend_on_no_layout(kind, lanes, devices):
  ids = [7, 1, 4, NOT_FINITE, 2]
  simulator = simulator_of("mean", lanes, devices, ids)
  simulator = dataclasses.replace(
    simulator,
    aggregator=randomly_weighted(kind),
    schedules={"aggregator.scale": lambda round_: 0.5},
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  key = key_for(simulator.seed, Purpose.AGGREGATION, 0)
  factors = [jax.random.uniform(jax.random.fold_in(key, r)) for r in range(4)]
  # By rank; the last client is in the cohort, and its update is rejected.
  expected = np.array(factors) @ CENTRES[[1, 2, 4, 7]]
  found = params_of(simulator, out.state)["w"]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def context_of(size, slot=0, **hparams):
  return AggregationContext(
    key=jax.random.key(0),
    noise_key=jax.random.key(1),
    slot=jnp.int32(slot),
    rank=slot + jnp.arange(size, dtype=jnp.int32),
    cohort_size=jnp.int32(size),
    hparams=hparams,
  )


@pytest.mark.parametrize("name", slow_but([*KINDS, "krum"], AGGREGATORS))
def test_nobody_changes_nothing(name):
  aggregator = AGGREGATORS[name]()
  update = {"w": jnp.full((2,), jnp.nan)}
  acc = aggregator.init(update, 3)
  rows = {"w": jnp.full((3, 2), jnp.nan)}
  context = context_of(3, **aggregator.hparams)
  acc = aggregator.add(
    acc, rows, jnp.full((3,), jnp.nan), jnp.zeros(3, bool), context
  )
  result = aggregator.finish(acc, jnp.float32(0), jnp.int32(0), context)
  np.testing.assert_array_equal(result["w"], np.zeros_like(result["w"]))
  assert result["w"].dtype == jnp.float32


def test_an_empty_cohort_leaves_the_server_as_it_is():
  ids = [0, 1]
  simulator = simulator_of("median", 3, 1, ids)
  state = simulator.dispatch(simulator.init(), simulator.plan(0, 1)).state
  ids[:] = []
  out = simulator.dispatch(state, simulator.plan(1, 1))
  assert out.rows[0]["clients"] == 0
  np.testing.assert_array_equal(
    params_of(simulator, out.state)["w"], params_of(simulator, state)["w"]
  )


CAPACITY, LANES = 6, 3


@jax.jit
def median_of(rows, present):
  aggregator = aggregators.median()
  acc = aggregator.init(rows[0], CAPACITY)
  for slot in range(0, CAPACITY, LANES):
    wave = slice(slot, slot + LANES)
    acc = aggregator.add(
      acc,
      rows[wave],
      jnp.ones(LANES),
      present[wave],
      context_of(LANES, slot),
    )
  count = jnp.sum(present, dtype=jnp.int32)
  weight = count.astype(jnp.float32)
  return aggregator.finish(acc, weight, count, context_of(CAPACITY))


@given(
  rows=hnp.arrays(
    np.float32,
    (CAPACITY, 2),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
  ),
  present=hnp.arrays(np.bool_, CAPACITY).filter(np.any),
)
def test_the_median_is_numpys(rows, present):
  expected = np.median(rows[present], axis=0)
  assert expected.dtype == np.float32
  found = median_of(np.where(present[:, None], rows, np.nan), present)
  # To the bit; devices may flush a mean that is subnormal to 0.
  np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-126)


def test_the_median_withstands_fewer_than_half():
  rows = np.array([[1e9], [1.0], [2.0], [3.0], [-1e9], [1e9]], np.float32)
  found = median_of(rows, np.array([True, True, True, True, True, False]))
  np.testing.assert_array_equal(found, [2.0])


def test_sums_are_at_least_float32():
  """300 ones: bfloat16 would not count beyond 256."""
  ones = jnp.ones((300,), jnp.bfloat16)
  acc = aggregators.zeros_accumulator(ones[0])
  for i in range(0, 300, 100):
    acc = aggregators.add_weighted(
      acc, ones[i : i + 100], jnp.ones(100), jnp.ones(100, bool)
    )
  assert acc.dtype == jnp.float32
  assert acc == 300
  assert aggregators.divide(acc, jnp.int32(600)) == 0.5


def test_a_sum_of_whole_numbers_is_exact():
  """Beyond 2^24, where float32 counts by twos."""
  rows = jnp.array([2**24, 1, 1, 2**30, -3, 7], jnp.int32)
  present = jnp.array([True, True, True, True, True, False])
  aggregator = aggregators.sum_()
  acc = aggregator.init(rows[0], 6)
  for i in (0, 3):
    wave = slice(i, i + 3)
    acc = aggregator.add(
      acc, rows[wave], jnp.full(3, jnp.nan), present[wave], context_of(3, i)
    )
  assert acc.dtype == jnp.int32
  total = aggregator.finish(
    acc, jnp.float32(jnp.nan), jnp.int32(5), context_of(6)
  )
  assert total == 2**30 + 2**24 - 1


def test_the_median_of_bfloat16_is_float32():
  """257 lies between two neighbors in bfloat16."""
  rows = jnp.array([256, 258], jnp.bfloat16)
  aggregator = aggregators.median()
  context = context_of(2)
  acc = aggregator.add(
    aggregator.init(rows[0], 2), rows, rows, jnp.ones(2, bool), context
  )
  found = aggregator.finish(acc, jnp.float32(2), jnp.int32(2), context)
  assert found.dtype == jnp.float32
  assert found == 257


UPDATE = {
  "a": jax.ShapeDtypeStruct((3,), jnp.float32),
  "b": jax.ShapeDtypeStruct((), jnp.bfloat16),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_aggregators_keep_to_the_contract(name):
  aggregators.check(AGGREGATORS[name](), UPDATE)


def in_pairs(acc, updates, weights, present, context):
  del acc, weights, present, context
  return updates


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    # It would be broadcast, to the same number for all parameters.
    (
      {"finish": lambda acc, w, n, context: jax.tree.map(jnp.sum, acc)},
      r"finish gives \(\) at \['a'\]; let it give \(3,\), as an update has",
    ),
    (
      {"finish": lambda acc, w, n, context: acc["a"]},
      r"finish gives nothing at \['a'",
    ),
    (
      {"finish": lambda acc, w, n, context: acc | {"c": acc["a"]}},
      r"finish gives \(3,\) at \['c'\]; let it give nothing",
    ),
    ({"add": in_pairs}, r"add gives float32\(2, 3\) at \['a'\]; let .*\(3,\)"),
    ({"add": lambda acc, u: acc}, r"add: TypeError: .* takes 2 positional"),
    ({"init": lambda update, n: 1 / 0}, "init: ZeroDivisionError"),
  ],
)
def test_an_aggregator_that_breaks_the_contract_is_refused(changes, match):
  broken = aggregators.mean()._replace(**changes)
  with pytest.raises(ValueError, match=rf"^aggregator\.name: {match}"):
    aggregators.check(broken, UPDATE)


def test_a_simulator_checks_its_aggregator():
  train = FederatedData(
    examples={
      "x": np.zeros((2, 3), np.float32),
      "a": np.ones(2, np.float32),
    },
    offsets=np.array([0, 1, 2]),
  )
  data = FederatedDataset(
    name="two", train=train, num_classes=0, example_shape=(3,)
  )
  task = quadratic(3)
  algorithm = fedavg(task, sgd(0.1), sgd(1.0))
  flat = lambda acc, w, n, context: jax.tree.map(jnp.sum, acc)
  simulator = make_simulator(
    task, algorithm, data, aggregator=aggregators.mean()._replace(finish=flat)
  )
  with pytest.raises(ValueError, match=r"finish gives \(\) at \['w'\]"):
    _ = simulator.checked
