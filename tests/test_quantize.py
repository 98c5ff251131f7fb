"""Quantized updates: alone against numpy and an encoder, and in real rounds."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim import transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.cli import describe
from fedjax_sim.config import build, flags
from fedjax_sim.core import Transform, TransformResult, validate
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.simulation.dispatch import Row
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.transforms import quantize
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

KEY = jax.random.key(0)
DIGITS = str(pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py")


@functools.cache
def jitted(bits, per_layer):
  return jax.jit(quantize(0.5, bits, per_layer=per_layer).apply)


def quantized(update, sparsity, bits, per_layer=True, anneal=1.0, done=0):
  hparams = {"sparsity": jnp.float32(sparsity), "anneal": jnp.float32(anneal)}
  result = jitted(bits, per_layer)(update, jnp.int32(done), (), hparams, KEY)
  assert (result.state, result.aux) == ((), ())
  aux = {**result.metrics, "bytes": result.bytes}
  assert {k: (v.dtype, v.shape) for k, v in aux.items()} == {
    "bytes": (jnp.float32, ()),
    "kept": (jnp.float32, ()),
  }
  out = jax.tree.map(np.asarray, result.update)
  return out, {k: float(v) for k, v in aux.items()}


def dropped(x, sparsity):
  """Which entries go, by the definition in float64."""
  x = np.asarray(x, np.float64)
  if x.min() == x.max():
    return np.zeros(x.shape, bool)
  bound = np.quantile(np.abs(x), sparsity) if sparsity > 0 else 0.0
  return np.abs(x) <= bound


def encoded(x, sparsity, bits):
  """Bounds, bitmap and codes of one array, as bytes on the wire."""
  x = np.ravel(np.asarray(x, np.float64))
  gone = dropped(x, sparsity)
  levels = np.linspace(x.min(), x.max(), 2**bits)
  codes = np.abs(x[~gone, None] - levels).argmin(axis=1)
  stream = np.array([x.min(), x.max()], np.float32).tobytes()
  if gone.any():
    stream += np.packbits(gone).tobytes()
  digits = codes[:, None] >> np.arange(bits)[::-1] & 1
  return stream + np.packbits(digits.astype(np.uint8)).tobytes()


def decoded(stream, x, sparsity, bits):
  """What `encoded` has kept, in x's shape."""
  low, high = np.frombuffer(stream[:8], np.float32).astype(np.float64)
  gone, rest = np.zeros(x.size, bool), stream[8:]
  if dropped(x, sparsity).any():
    length = -(-x.size // 8)
    bitmap = np.frombuffer(rest[:length], np.uint8)
    gone = np.unpackbits(bitmap)[: x.size].astype(bool)
    rest = rest[length:]
  kept = int((~gone).sum())
  digits = np.unpackbits(np.frombuffer(rest, np.uint8))[: kept * bits]
  codes = digits.reshape(kept, bits) @ (1 << np.arange(bits)[::-1])
  out = np.zeros(x.size)
  out[~gone] = np.linspace(low, high, 2**bits)[codes]
  return out.reshape(x.shape)


# --- against float64 ----------------------------------------------------------

SHAPES = {"a": (7,), "b": (), "c": (5, 4), "d": (31,), "e": (40, 30)}


def normals(seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: np.float32(scale * rng.normal(0.3, 1, shape))
    for (name, shape), scale in zip(
      SHAPES.items(), (1.0, 2.0, 1e-3, 1e3, 0.1), strict=True
    )
  }


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_every_array_is_encoded_and_decoded(sparsity, bits):
  update = normals()
  out, aux = quantized(update, sparsity, bits)
  sizes, kept = 0, 0
  for name, x in update.items():
    stream = encoded(x, sparsity, bits)
    sizes += len(stream)
    kept += np.sum(~dropped(x, sparsity))
    span = float(x.max() - x.min()) or abs(float(x))
    np.testing.assert_allclose(
      out[name], decoded(stream, x, sparsity, bits), rtol=0, atol=1e-6 * span
    )
  assert aux["bytes"] == sizes
  assert aux["kept"] == pytest.approx(kept / flat(update).size)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("bits", [1, 8])
def test_all_arrays_together(sparsity, bits):
  update = normals(1)
  out, aux = quantized(update, sparsity, bits, per_layer=False)
  x = flat(update)
  stream = encoded(x, sparsity, bits)
  expected = decoded(stream, x, sparsity, bits)
  np.testing.assert_allclose(
    flat(out), expected, rtol=0, atol=1e-6 * (x.max() - x.min())
  )
  assert {name: y.shape for name, y in out.items()} == SHAPES
  assert aux["bytes"] == len(stream)
  assert aux["kept"] == pytest.approx(np.mean(~dropped(x, sparsity)))


def test_bytes_by_hand():
  update = {
    "a": np.arange(1, 11, dtype=np.float32),  # 6, ..., 10 are kept
    "b": np.full(3, 3.0, np.float32),
    "c": np.float32(-2),
  }
  _, aux = quantized(update, 0.5, 4)
  a = 8 + 3 + 2  # bounds; 5 codes of 4 bits; a bitmap of 10 bits
  b, c = 8 + 2, 8 + 1  # no bitmap
  assert aux["bytes"] == a + b + c
  assert aux["kept"] == pytest.approx((5 + 3 + 1) / 14)
  _, aux = quantized(update, 0.0, 4)
  assert aux == {"bytes": (8 + 5) + b + c, "kept": 1.0}
  # Magnitudes 1, 2, 2, 3, 3, 3, 3, | 4, 5, ..., 10 at place 6.5.
  _, aux = quantized(update, 0.5, 4, per_layer=False)
  assert aux == {"bytes": 8 + 4 + 2, "kept": 0.5}


@pytest.mark.parametrize("per_layer", [True, False])
def test_arrays_without_entries_cost_nothing(per_layer):
  x, none = np.array([0, 1, 2, 5], np.float32), np.zeros((0, 3), np.float32)
  out, aux = quantized({"a": none, "b": x, "c": none}, 0.5, 4, per_layer)
  alone, own = quantized({"b": x}, 0.5, 4, per_layer)
  np.testing.assert_array_equal(out["b"], alone["b"])
  assert out["a"].shape == out["c"].shape == none.shape
  assert aux == own
  for nothing in ({}, {"a": none}):
    assert quantized(nothing, 0.5, 4, per_layer)[1] == {"bytes": 0, "kept": 0}


def test_levels_and_ties_by_hand():
  x = np.array([-3, -1.6, -0.9, 0.4, 0.5, 1.5, 3], np.float32)
  # Levels -3, -1, 1, 3; of the magnitudes 0.4, 0.5 and 0.9 are below 0.375.
  out, _ = quantized({"x": x}, 0.375, 2)
  np.testing.assert_allclose(out["x"], [-3, -1, 0, 0, 0, 1, 3], rtol=1e-6)
  # Halfway between two levels is the lower one.
  out, _ = quantized({"x": np.array([-1, 1, 2, 3], np.float32)}, 0.0, 1)
  np.testing.assert_array_equal(out["x"], [-1, -1, 3, 3])


def test_magnitudes_at_the_quantile_are_dropped():
  x = np.array([-1, 1, 1, -1, 2], np.float32)
  out, aux = quantized({"x": x}, 0.1, 8)
  np.testing.assert_array_equal(out["x"], [0, 0, 0, 0, 2])
  assert aux["kept"] == pytest.approx(0.2)


def test_a_sparsity_next_to_1_keeps_the_largest():
  sparsity = 1 - 1e-9  # which float32 rounds to 1
  assert quantize(sparsity).hparams["sparsity"] == sparsity
  x = np.array([1, -4, 2, 3], np.float32)
  out, _ = quantized({"x": x}, sparsity, 8)
  np.testing.assert_array_equal(out["x"], [0, -4, 0, 0])


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("value", [0.0, 0.1, -7e-5, 3e38])
def test_what_is_constant_stays(value, sparsity, per_layer):
  update = {
    "x": np.full((3, 5), value, np.float32),
    "y": np.full((), value, np.float32),
  }
  out, aux = quantized(update, sparsity, 4, per_layer)
  for name, x in update.items():
    np.testing.assert_array_equal(out[name], x)
  assert aux["kept"] == 1


def test_large_numbers_do_not_overflow():
  x = np.array([-3.4e38, -1e38, 1.0, 3.4e38], np.float32)
  out, _ = quantized({"x": x}, 0.5, 1)
  np.testing.assert_array_equal(out["x"], x[[0, 1, 1, 3]] * [1, 0, 0, 1])
  out, _ = quantized({"x": x}, 0.0, 4)
  assert np.all(np.isfinite(out["x"]))
  levels = np.linspace(-3.4e38, 3.4e38, 16)
  nearest = np.abs(x[:, None] - levels).argmin(axis=1)
  np.testing.assert_allclose(out["x"], levels[nearest], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("per_layer", [True, False])
def test_what_is_not_finite_is_not_hidden(bad, per_layer):
  x = np.array([1, 2, bad, 3], np.float32)
  out, _ = quantized({"x": x}, 0.9, 8, per_layer)
  assert not np.all(np.isfinite(out["x"]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
  x = normals()["d"].astype(dtype) / 512
  update = {"x": x, "y": np.full(5, 0.3, dtype)}
  out, _ = quantized(update, 0.5, 4)
  assert out["x"].dtype == out["y"].dtype == dtype
  expected = decoded(encoded(x, 0.5, 4), x, 0.5, 4)
  rounding = 2 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
  np.testing.assert_allclose(out["x"], expected, rtol=0, atol=rounding)
  np.testing.assert_array_equal(out["y"], update["y"])
  mixed, _ = quantized({"x": x, "y": normals()["a"]}, 0.5, 4, False)
  assert (mixed["x"].dtype, mixed["y"].dtype) == (dtype, jnp.float32)


@pytest.mark.slow
def test_double_precision(x64):
  rng = np.random.default_rng(0)
  x = 1 + 1e-12 * rng.normal(size=30)
  hparams = {"sparsity": jnp.float64(0.5), "anneal": jnp.float64(1)}
  apply = quantize(0.5, 4).apply
  result = apply({"x": jnp.array(x)}, jnp.int32(0), (), hparams, KEY)
  assert result.bytes is not None
  out, aux = result.update, {**result.metrics, "bytes": result.bytes}
  assert out["x"].dtype == jnp.float64
  assert {v.dtype for v in aux.values()} == {jnp.dtype(jnp.float32)}
  stream = encoded(x, 0.5, 4)
  assert float(aux["bytes"]) == len(stream)
  levels = np.linspace(x.min(), x.max(), 16)
  nearest = levels[np.abs(x[:, None] - levels).argmin(axis=1)]
  expected = np.where(dropped(x, 0.5), 0, nearest)
  np.testing.assert_allclose(out["x"], expected, rtol=0, atol=5e-16)


# --- properties ---------------------------------------------------------------

# Quantiles whose place among up to 2^16 entries is exact in float32.
SHARES = st.integers(0, 63).map(lambda i: i / 64)
BITS = st.sampled_from([1, 2, 4, 8, 16])


def floats(most):
  """Of any size up to `most`; no subnormals, which the devices flush to 0."""
  return st.floats(-most, most, width=32, allow_subnormal=False)


def updates(elements):
  leaf = lambda shape: hnp.arrays(np.float32, shape, elements=elements)
  return st.fixed_dictionaries({"b": leaf((6,)), "w": leaf((5, 7))})


def half_a_bin(x, bits):
  """Half the distance of two levels, and what float32 may add."""
  x = np.asarray(x, np.float64)
  rounding = 2.0**-21 * np.abs(x).max() + 1e-37
  return (x.max() - x.min()) / (2**bits - 1) / 2 + rounding


@given(update=updates(floats(2.0**127)), sparsity=SHARES, bits=BITS)
def test_what_is_dropped_and_what_is_near(update, sparsity, bits):
  out, aux = quantized(update, sparsity, bits)
  count = 0
  for name, x in update.items():
    gone, kept = dropped(x, sparsity), out[name][~dropped(x, sparsity)]
    count += kept.size
    assert np.all(out[name][gone] == 0)
    away = np.abs(kept.astype(np.float64) - x[~gone])
    assert np.all(away <= half_a_bin(x, bits))
    assert len(np.unique(kept)) <= 2**bits
    # Least and greatest are levels, the first and the last.
    for end in (x.min(), x.max()):
      found = out[name][(x == end) & ~gone]
      assert np.all(np.abs(found - end) <= 2e-38)  # flushed to 0 at the least
    # Nobody overtakes anybody.
    order = np.argsort(x[~gone], kind="stable")
    steps = np.diff(kept[order].astype(np.float64))
    assert np.all(steps >= -(2.0**-21) * np.abs(x).max())
  assert aux["kept"] == pytest.approx(count / 41)
  assert aux["bytes"] == sum(
    len(encoded(x, sparsity, bits)) for x in update.values()
  )


@given(update=updates(floats(100.0)), bits=st.sampled_from([1, 2, 4, 8]))
def test_without_sparsity_only_zeros_go_and_twice_is_once(update, bits):
  for x in update.values():  # levels that float32 tells apart, and not from 0
    span = float(x.max()) - float(x.min())
    assume(span == 0 or span > max(2.0**-10 * np.abs(x).max(), 1e-30))
  out, aux = quantized(update, 0.0, bits)
  constant = {name: np.ptp(x) == 0 for name, x in update.items()}
  zeros = sum(np.sum(x == 0) for n, x in update.items() if not constant[n])
  assert aux["kept"] == pytest.approx(1 - zeros / 41)
  again, _ = quantized(out, 0.0, bits)
  np.testing.assert_array_equal(flat(again), flat(out))


@given(
  update=updates(st.integers(-(2**20), 2**20).map(lambda i: i / 2**18)),
  sparsity=SHARES,
  bits=BITS,
  power=st.integers(-20, 20),
)
def test_a_scaled_update_is_scaled(update, sparsity, bits, power):
  out, aux = quantized(update, sparsity, bits)
  scale = np.float32(2.0**power)
  scaled = jax.tree.map(lambda x: x * scale, update)
  other, same = quantized(scaled, sparsity, bits)
  np.testing.assert_array_equal(flat(other), flat(out) * scale)
  assert same == aux


@given(update=updates(floats(100.0)), sparsity=SHARES, bits=BITS)
def test_arrays_by_themselves_or_as_one(update, sparsity, bits):
  out, aux = quantized(update, sparsity, bits)
  # Compiled in another way, a tie may be rounded to the other level.
  close = lambda a, b, x: np.testing.assert_allclose(
    a, b, rtol=0, atol=2 * half_a_bin(x, bits)
  )
  alone = {n: quantized({n: x}, sparsity, bits) for n, x in update.items()}
  for name, (one, _) in alone.items():
    close(out[name], one[name], update[name])
  assert aux["bytes"] == sum(a["bytes"] for _, a in alone.values())
  together = quantized(update, sparsity, bits, per_layer=False)
  joined = quantized({"x": flat(update)}, sparsity, bits)
  close(flat(together[0]), joined[0]["x"], flat(update))
  assert together[1] == joined[1]


# --- rounds -------------------------------------------------------------------


def mover(dim):
  """One step of rate 1: a client's update is its centre minus the params."""
  task = quadratic(dim)
  return task, fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform")


def movers(centres, *chain, **more):
  centres = np.asarray(centres)
  task, algorithm = mover(centres.shape[1])
  return make_simulator(
    task,
    algorithm,
    quadratic_data(centres, more.pop("curvatures", None)),
    batching=LocalBatching(batch_size=1),
    transforms=chain,
    **more,
  )


def round_trip(x, sparsity, bits):
  x = np.float32(x)
  return decoded(encoded(x, sparsity, bits), x, sparsity, bits)


@pytest.mark.parametrize(
  ("lanes", "at_once"), slow_but([(2, 4)], [(1, 1), (2, 4)])
)
def test_the_sparsity_anneals_from_round_to_round(lanes, at_once):
  centres = np.random.default_rng(3).normal(size=(3, 9))
  simulator = movers(
    centres,
    quantize(0.75, 4, anneal=0.5),
    lanes=lanes,
    rounds_per_dispatch=at_once,
  )
  state, w = simulator.init(), np.zeros(9)
  rows: list[Row] = []
  for out in simulator.run(state, 4):
    state, rows = out.state, rows + out.rows
  # Of 9 entries, those at places up to 6, 3, 1.5 and 0.75 are dropped.
  for row, kept in zip(rows, (2, 5, 7, 8), strict=True):
    assert row["quantize/kept"] == pytest.approx(kept / 9)
    assert row["quantize/bytes"] == 8 + np.ceil(kept * 4 / 8) + 2
    assert row["bytes_up"] == 3 * (4 + row["quantize/bytes"])
    sparsity = 0.75 * 0.5 ** (row["round"] - 1)
    w += np.mean([round_trip(c - w, sparsity, 4) for c in centres], axis=0)
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=1e-5)
  assert int(state.shared[0]) == 4
  assert simulator.compilations == 1


def test_hyper_parameters_change_without_compilation():
  centres = np.random.default_rng(4).normal(size=(2, 9))
  simulator = movers(centres, quantize(0.75, 4))
  start = simulator.init()
  for sparsity, anneal in ((0.75, 1.0), (0.25, 0.5), (0.0, 1.0)):
    own = {"quantize": {"sparsity": sparsity, "anneal": anneal}}
    hparams = {**simulator.hparams, "transforms": own}
    out = simulator.dispatch(start, simulator.plan(0, 1), hparams)
    expected = np.mean([round_trip(c, sparsity, 4) for c in centres], axis=0)
    np.testing.assert_allclose(
      params_of(simulator, out.state)["w"], expected, atol=1e-6
    )
  assert simulator.compilations == 1


def test_the_state_keeps_its_shapes_and_a_run_goes_on():
  centres = np.random.default_rng(5).normal(size=(4, 9))
  make = lambda: movers(
    centres, quantize(0.9, 3, anneal=0.7), clients_per_round=2
  )
  whole = make()
  end = train(whole, 5)
  first, second = make(), make()
  kept = first.states.to_host(train(first, 2))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), first.states.host_shapes)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == shapes
  state = second.states.to_devices(kept)
  assert int(state.shared[0]) == 2
  for out in second.run(state, 5):
    state = out.state
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
    np.testing.assert_array_equal(a, b)


def digest(lanes, devices, rounds=3, **runtime):
  if devices > jax.device_count():
    pytest.skip(f"needs 2 devices, there is {jax.device_count()}")
  data = blobs([3, 9, 14, 5, 22, 7, 11, 4])
  task = MODELS["mlp"](data)
  simulator = Simulator(
    task=task,
    algorithm=fedavg(task, sgd(0.3), sgd(1.0)),
    data=data,
    sampler=make_simulator(task, fedavg(task, sgd(1), sgd(1)), data).sampler,
    batching=LocalBatching(batch_size=4),
    transforms=[quantize(0.6, 5, anneal=0.9)],
    runtime=Runtime(
      lanes=lanes,
      devices=devices,
      rounds_per_dispatch=1,
      donate=False,
      **runtime,
    ),
  )
  state = simulator.init()
  rows: list[Row] = []
  for out in simulator.run(state, rounds):
    state, rows = out.state, rows + out.rows
  return flat(params_of(simulator, state)), rows


@pytest.mark.slow
def test_the_same_on_two_devices():
  one, rows = digest(1, 1)
  for lanes, devices in ((1, 2), (3, 1)):
    other, same = digest(lanes, devices)
    np.testing.assert_allclose(other, one, atol=1e-6)
    for key in ("quantize/kept", "quantize/bytes", "bytes_up"):
      assert [r[key] for r in same] == pytest.approx([r[key] for r in rows])
  in_order = [digest(1, n, deterministic_reduction=2)[0] for n in (1, 2)]
  np.testing.assert_array_equal(*in_order)


def test_devices_that_share_a_model():
  one, rows = digest(1, 1, rounds=1)
  other, same = digest(1, 2, rounds=1, model_devices=2)
  np.testing.assert_allclose(other, one, atol=1e-6)
  assert same[0]["quantize/bytes"] == rows[0]["quantize/bytes"]


# --- bytes of a round ---------------------------------------------------------


def one_row(simulator):
  return simulator.dispatch(simulator.init(), simulator.plan(0, 1)).rows[0]


def test_fewer_bytes_go_up():
  centres = np.random.default_rng(6).normal(size=(3, 100))
  plain = one_row(movers(centres))
  row = one_row(movers(centres, quantize(0.9, 4)))
  each = 8 + 5 + 13  # bounds, 10 codes of 4 bits, a bitmap of 100 bits
  assert row["quantize/bytes"] == each
  assert row["quantize/kept"] == pytest.approx(0.1)
  assert plain["bytes_up"] == 3 * (400 + 4)  # with the weight
  assert row["bytes_up"] == 3 * (each + 4)
  assert row["bytes_down"] == plain["bytes_down"] == 3 * 400
  assert isinstance(row["bytes_up"], int)


def test_clients_that_were_rejected_have_sent_theirs():
  centres = np.random.default_rng(7).normal(size=(3, 10))
  centres[2, 0] = 1e30  # with its curvature, an update that is not finite
  simulator = movers(
    centres, quantize(0.5, 8), lanes=3, curvatures=[1, 1, 1e30]
  )
  row = one_row(simulator)
  assert (row["clients"], row["clients_rejected"]) == (2, 1)
  assert row["quantize/bytes"] == 8 + 5 + 2
  assert row["bytes_up"] == 3 * (8 + 5 + 2 + 4)


def test_the_last_of_several_counts():
  centres = np.random.default_rng(8).normal(size=(2, 100))
  fine = quantize(0.0, 16)._replace(name="fine")
  coarse = quantize(0.9, 1)._replace(name="coarse")
  steps = [transforms.clip(1e6), fine, coarse]
  up = {}
  for chain in (steps, steps[::-1]):
    row = one_row(movers(centres, *chain))
    last = "coarse" if chain is steps else "fine"
    assert row["bytes_up"] == 2 * (row[f"{last}/bytes"] + 4)
    assert row["clip/clipped"] == 0
    up[last] = row["bytes_up"]
  assert up["coarse"] < up["fine"]


def test_numbers_of_a_transform_are_metrics():
  def apply(update, shared, state, hparams, key):
    three = jnp.float32(3)
    return TransformResult(update, state, update["w"], {"three": three})

  told = Transform(name="told", hparams={}, apply=apply)
  centres = np.ones((2, 3))
  row = one_row(movers(centres, told))
  assert row.pop("told/three") == 3
  assert row == one_row(movers(centres))


def test_the_uncompressed_bytes_of_a_client():
  simulator = movers(np.ones((2, 3)), quantize(0.5))
  sizes = {"down": 12, "up": 16, "update": 12, "message": 12}
  others = {"population": 2, "links": 1.0, "coded": True}
  assert simulator.traffic._asdict() == {**sizes, **others}


# --- configs ------------------------------------------------------------------


def test_a_config_quantizes():
  changes = {
    "transforms.clip.norm": "1.0",
    "transforms.quantize.sparsity": "0.75",
    "transforms.quantize.bits": "4",
    "transforms.quantize.anneal": "0.5",
    "transforms.quantize.per_layer": "False",
    "model.name": "logistic_regression",
    "model.hidden_sizes": "None",
    "runtime.devices": "1",
  }
  source = flags.load(DIGITS, changes)
  experiment = build.build(source)
  simulator = experiment.simulator
  assert [t.name for t in simulator.transforms] == ["clip", "quantize"]
  own = simulator.hparams["transforms"]["quantize"]
  assert own == {"sparsity": 0.75, "anneal": 0.5}
  row = one_row(simulator)
  assert 0 < row["quantize/kept"] <= 0.25
  # All of the 650 entries have one pair of bounds and one bitmap.
  kept = row["quantize/kept"] * 650
  assert row["quantize/bytes"] == pytest.approx(8 + 82 + kept / 2, abs=1)
  assert row["bytes_up"] == pytest.approx(20 * (row["quantize/bytes"] + 4))
  down, up, *_ = simulator.traffic
  line = f"{down:,} down, {up:,} up, before transforms"
  assert line in describe.describe(experiment)


def test_a_config_does_not_quantize_unless_told():
  assert not build.build(flags.load(DIGITS)).simulator.transforms
  with pytest.raises(
    ValueError, match="quantize lacks .*sparsity' .*; give it"
  ):
    flags.load(DIGITS, {"transforms.quantize.bits": "4"})


def test_the_defaults():
  transform = quantize(0.5)
  assert transform.name == "quantize"
  assert transform.hparams == {"sparsity": 0.5, "anneal": 1.0}
  update = normals()
  shared = transform.init(update, transform.hparams)
  arguments = (update, shared, (), transform.hparams, KEY)
  out, _, _, _, size = jax.jit(transform.apply)(*arguments)
  expected, same = quantized(update, 0.5, 8, per_layer=True)
  np.testing.assert_allclose(flat(out), flat(expected), rtol=1e-6)
  assert float(size) == same["bytes"]


def test_the_shared_state_counts_rounds():
  transform = quantize(0.5)
  shared = transform.init({}, transform.hparams)
  for t in itertools.count():
    assert (shared.shape, shared.dtype, int(shared)) == ((), jnp.int32, t)
    if t == 3:
      break
    shared = transform.update(shared, {}, transform.hparams)


@pytest.mark.parametrize(
  ("field", "value", "error", "match"),
  [
    ("sparsity", 1.0, ValueError, "=1.0 .* >= 0 and < 1"),
    ("sparsity", -0.1, ValueError, "=-0.1 .* >= 0 and < 1"),
    ("sparsity", float("nan"), ValueError, "=nan .* finite number"),
    ("sparsity", "0.5", TypeError, "='0.5' is a str; give a number"),
    ("sparsity", True, TypeError, "=True is a bool; give a number"),
    ("bits", 0, ValueError, "=0 .* from 1 to 16"),
    ("bits", 17, ValueError, "=17 .* from 1 to 16"),
    ("bits", 4.0, TypeError, "=4.0 is a float; give a whole number"),
    ("anneal", 0.0, ValueError, "=0.0 .* > 0 and <= 1"),
    ("anneal", 1.5, ValueError, "=1.5 .* > 0 and <= 1"),
    ("anneal", None, TypeError, "=None is a NoneType; give a number"),
    ("per_layer", 1, TypeError, "=1 is a int; give True or False"),
    ("per_layer", "no", TypeError, "='no' is a str; give True or False"),
  ],
)
def test_refused(field, value, error, match):
  arguments = {"sparsity": 0.5, field: value}
  with pytest.raises(error, match=f"^{field}{match}"):
    quantize(**arguments)


def test_a_name_that_is_meant_otherwise():
  with pytest.raises(validate.UnknownNameError, match="mean .*sparsity'"):
    flags.load(DIGITS, {"transforms.quantize.sparsty": "0.5"})
