"""Secure aggregation: masks, drop-outs and sums, against numpy's integers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.core import AggregationContext
from fedjax_sim.distributed import make_mesh, ordered_sum, packed_psum
from fedjax_sim.privacy import secure
from fedjax_sim.privacy.secure.aggregators import secure_mean, secure_sum
from fedjax_sim.privacy.secure.fixed_point import fixed_point, fraction_bits
from problems import (
  MODELS,
  blobs,
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

CLIENTS, SIZE = 7, 5


def context_of(hparams, cohort_size=CLIENTS, key=0):
  return AggregationContext(
    key=jax.random.key(key),
    noise_key=jax.random.key(key),
    slot=jnp.int32(0),
    rank=jnp.arange(cohort_size, dtype=jnp.int32),
    cohort_size=jnp.int32(cohort_size),
    hparams=jax.tree.map(jnp.float32, dict(hparams)),
  )


def received(aggregator, rows, weights, present, context):
  """The accumulator, in waves of one and of all that is left."""
  acc = aggregator.init(jax.tree.map(lambda x: x[0], rows), len(weights))
  for part in (slice(0, 1), slice(1, None)):
    acc = aggregator.add(
      acc,
      jax.tree.map(lambda x, part=part: x[part], rows),
      weights[part],
      present[part],
      context._replace(rank=context.rank[part]),
    )
  return acc


@pytest.mark.parametrize(
  ("half", "clients"),
  slow_but(
    [(1, 2), (1, 40), (2, 1), (2, 3), (2, 7), (4, 2), (4, 40)],
    itertools.product([1, 2, 4], [1, 2, 3, 7, 40]),
  ),
)
def test_the_masks_of_all_add_up_to_nothing(clients, half):
  context = context_of({}, clients)
  like = {"w": jnp.zeros((SIZE,)), "b": jnp.zeros(())}
  mask = lambda rank: secure.client_mask(context, like, rank, half)
  masks = jax.vmap(mask)(context.rank)
  for leaf in jax.tree.leaves(masks):
    assert leaf.dtype == jnp.uint32
    total = np.sum(np.asarray(leaf, np.uint64), 0) % 2**32
    assert not total.any()
    if clients > 1:
      assert np.asarray(leaf).any(-1 if leaf.ndim > 1 else 0).all()


@pytest.mark.slow
def test_one_masked_message_is_uniform():
  """The server's view of a client whose update is all ones."""
  size = 50_000
  aggregator = secure.secure(fixed_point(CLIENTS, clip=1.0), neighbors=2)
  present = jnp.arange(CLIENTS) == 3
  acc = received(
    aggregator,
    jnp.ones((CLIENTS, size)),
    jnp.ones(CLIENTS),
    present,
    context_of(aggregator.hparams),
  )
  numbers = np.asarray(acc.total[0])
  for shift in (0, 12, 24):  # the lowest, middle and highest bits
    counts = np.bincount((numbers >> shift) & 255, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.slow
def test_a_message_has_no_more_bits_than_asked_for():
  aggregator = secure.secure(
    fixed_point(CLIENTS, clip=1.0, bits=9), neighbors=2
  )
  acc = received(
    aggregator,
    jnp.ones((CLIENTS, 1000)),
    jnp.ones(CLIENTS),
    jnp.arange(CLIENTS) == 0,
    context_of(aggregator.hparams),
  )
  assert 450 < int(acc.total[0].max()) < 2**9


@functools.partial(jax.jit, static_argnames=("weighted", "bits"))
def joined(rows, weights, present, weighted=False, bits=32):
  code = fixed_point(
    CLIENTS, clip=2.0, max_weight=8.0 if weighted else None, bits=bits
  )
  aggregator = secure.secure(code, neighbors=4)
  context = context_of(aggregator.hparams)
  acc = received(aggregator, rows, weights, present, context)
  return aggregator.finish(acc, jnp.float32(0), jnp.int32(0), context)


contributions = hnp.arrays(
  np.float32,
  (CLIENTS, SIZE),
  elements=st.floats(-2, 2, width=32, allow_subnormal=False),
)


@settings(deadline=None, max_examples=40)
@given(contributions, hnp.arrays(np.bool_, CLIENTS), st.sampled_from([9, 32]))
def test_a_sum_is_within_its_bound_whoever_is_missing(rows, present, bits):
  exact = rows[present].astype(np.float64).sum(0)
  poisoned = np.where(present[:, None], rows, np.nan)
  found = joined(poisoned, np.ones(CLIENTS, np.float32), present, bits=bits)
  bound = present.sum() * 2.0 * 2.0 ** -(fraction_bits(CLIENTS, bits) + 1)
  rounding = 2.0**-23 * np.abs(rows).sum(0)
  assert np.all(np.abs(np.asarray(found) - exact) <= bound + rounding)


@settings(deadline=None, max_examples=40)
@given(
  contributions,
  hnp.arrays(np.bool_, CLIENTS).filter(np.any),
  hnp.arrays(np.float32, CLIENTS, elements=st.integers(1, 8)),
)
def test_a_mean_is_weighted(rows, present, weights):
  expected = np.average(rows[present], axis=0, weights=weights[present])
  found = joined(rows, weights, present, weighted=True)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_drops_out_is_recovered_bit_for_bit():
  """The unmasked total is the sum of those who arrived, as numpy adds."""
  rows = np.random.default_rng(0).uniform(-1, 1, (CLIENTS, SIZE))
  rows = rows.astype(np.float32)
  code = fixed_point(CLIENTS, clip=1.0)
  aggregator = secure.secure(code, neighbors=4, dropout=0.4)
  scale = 2.0 ** fraction_bits(CLIENTS, 32)
  numbers = np.round(rows * scale).astype(np.int64)
  sizes = set()
  for key in range(4):
    context = context_of(aggregator.hparams, key=key)
    acc = received(
      aggregator, rows, jnp.ones(CLIENTS), jnp.ones(CLIENTS, bool), context
    )
    arrived = np.asarray(acc.arrived, bool)
    sizes.add(int(arrived.sum()))
    found = secure.unmasked(acc, context, 2)[0]
    expected = numbers[arrived].sum(0) % 2**32
    np.testing.assert_array_equal(found, expected.astype(np.uint32))
  assert len(sizes) > 1
  assert min(sizes) < CLIENTS


def test_stochastic_rounding_keeps_the_mean():
  code = fixed_point(1, clip=1.0, bits=4, rounding="stochastic")
  x = jnp.full((40_000,), 0.3)
  message = code.encode(
    x, jnp.float32(1), jax.random.key(0), {"clip": jnp.float32(1)}
  )
  numbers = np.asarray(message[0])
  assert set(numbers) == {1, 2}
  mean, scale = 0.3, 2.0 ** fraction_bits(1, 4)
  assert abs(numbers.mean() / scale - mean) < 5 * 0.5 / scale / 200


@pytest.mark.parametrize(("clients", "bits"), [(1, 2), (64, 8), (2**30, 32)])
def test_a_sum_that_could_overflow_is_refused(clients, bits):
  with pytest.raises(ValueError, match=rf"bits={bits}: .*overflow"):
    fixed_point(clients, clip=1.0, bits=bits)


@pytest.mark.parametrize("clients", [1, 3, 63, 64, 1000])
@pytest.mark.parametrize("bits", [12, 32])
def test_the_largest_sum_just_fits(clients, bits):
  largest = clients * 2 ** fraction_bits(clients, bits)
  assert largest <= 2 ** (bits - 1) - 1 < 2 * largest


@pytest.mark.slow
def test_a_cohort_that_is_too_large_gives_nan():
  aggregator = secure.secure(fixed_point(2, clip=1.0), neighbors=2)
  context = context_of(aggregator.hparams, cohort_size=3)
  args = jnp.ones((3, 4)), jnp.ones(3), jnp.ones(3, bool), context
  acc = received(aggregator, *args)
  found = aggregator.finish(acc, jnp.float32(3), jnp.int32(3), context)
  assert np.isnan(found).all()


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"neighbors": 3}, r"neighbors=3 is odd"),
    ({"neighbors": 0}, r"neighbors=0 is out of range"),
    ({"dropout": 1.5}, r"dropout=1\.5 is out of range"),
    ({"bits": 33}, r"bits=33 is out of range"),
    ({"clip": 0.0}, r"clip=0\.0 is out of range"),
    ({"rounding": "up"}, r"rounding='up' is unknown"),
    (
      {"rounding": "nearest", "noise_multiplier": 1.0},
      r"rounding='nearest' does not go with noise_mult",
    ),
  ],
)
def test_bad_arguments_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    secure_sum(10, **{"clip": 1.0, **changes})


@pytest.mark.parametrize("noise", [None, 0.5])
def test_the_aggregators_keep_to_the_contract(noise):
  update = {
    "a": jax.ShapeDtypeStruct((3,), jnp.float32),
    "b": jax.ShapeDtypeStruct((), jnp.bfloat16),
  }
  most = None if noise else 3.0
  for made in (
    secure_sum(10, clip=1.0, noise_multiplier=noise),
    secure_mean(10, clip=1.0, max_weight=most, noise_multiplier=noise),
  ):
    aggregators.check(made, update)


@pytest.mark.parametrize("join", ["packed_psum", "ordered_sum"])
def test_devices_add_whole_numbers_modulo_2_32(join):
  if jax.device_count() < 2:
    pytest.skip("needs 2 devices")
  rows = np.array([[2**32 - 5, 2**31 + 1], [7, 2**31 + 2]], np.uint32)
  add = {
    "packed_psum": lambda x: packed_psum(x[0]),
    "ordered_sum": lambda x: ordered_sum(x, 2),
  }[join]
  split, whole = jax.P("clients"), jax.P()
  total = jax.shard_map(
    add,
    mesh=make_mesh(2),
    in_specs=split,
    out_specs=whole,
    check_vma=False,
  )
  found = jax.jit(total)(rows)
  assert found.dtype == jnp.uint32
  np.testing.assert_array_equal(found, [2, 3])


CENTRES = np.random.default_rng(0).uniform(-1, 1, (9, 4))


@functools.cache
def quadratic_run(lanes, devices, noise=None, dropout=0.3):
  """Clients whose updates are their centres, which no order changes."""
  task = quadratic(4)
  code = secure_sum(9, clip=2.0, dropout=dropout, noise_multiplier=noise)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.5), sgd(0.1)),
    quadratic_data(CENTRES),
    lanes=lanes,
    devices=devices,
    aggregator=code,
    sampler=sampling.uniform(9, 5),
  )
  return params_of(simulator, train(simulator, 3))["w"]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
  ("lanes", "devices", "noise"),
  slow_but([(3, 2, 0.3)], itertools.product([1, 3], [2], [None, 0.3])),
)
def test_a_run_has_the_same_bits_on_any_grid(lanes, devices, noise):
  found = quadratic_run(lanes, devices, noise)
  assert np.abs(found).max() > 0.01
  np.testing.assert_array_equal(found, quadratic_run(1, 1, noise))
  assert not np.array_equal(found, quadratic_run(1, 1, noise, dropout=0.0))


def test_a_run_is_that_of_the_plain_mean():
  data = blobs([5, 9, 12, 3, 7])
  task = MODELS["lr"](data)
  run = lambda aggregator: (lambda s: flat(params_of(s, train(s, 5))))(
    make_simulator(
      task, fedavg(task, sgd(0.1), sgd(1.0)), data, aggregator=aggregator
    )
  )
  plain = run(aggregators.weighted_mean())
  found = run(secure_mean(5, clip=4.0, max_weight=12.0))
  assert np.abs(plain).max() > 0.1
  np.testing.assert_allclose(found, plain, atol=5e-6)


def config_of(**fields):
  config = default_config()
  config.aggregator.name = "secure_mean"
  for name, value in fields.items():
    config.aggregator[name] = value
  return config


def test_a_config_tells_the_largest_weight_and_cohort():
  config = config_of(clip=1.0)
  config.client.max_examples = 7
  simulator = build(config).simulator
  assert simulator.hparams["aggregator"] == {
    "clip": 1.0,
    "max_weight": 7.0,
    "dropout": 0.0,
  }


@pytest.mark.parametrize(
  ("fields", "server", "match"),
  [
    ({}, {}, r"'secure_mean' lacks the argument 'aggregator\.clip'"),
    (
      {"clip": 1.0},
      {"aggregator": "mean"},
      r"'mean' does not take 'aggregator\.clip'",
    ),
    (
      {"clip": 1.0, "noise_multiplier": 1.0},
      {"sampler": "poisson"},
      r"aggregator\.noise_multiplier: every client",
    ),
    (
      {"clip": 1.0, "max_weight": 1.0},
      {"aggregator": "secure_sum"},
      r"does not take 'aggregator\.max_weight'",
    ),
  ],
)
def test_a_config_that_does_not_fit_is_refused(fields, server, match):
  config = config_of(**fields)
  for section, name in server.items():
    config[section].name = name
  with pytest.raises(ValueError, match=match):
    build(config)
