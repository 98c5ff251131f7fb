"""Compressors: against closed forms, numpy and encoders that write the bits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy import stats

from fedjax_sim import aggregators, transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.contract.checks import CHECKS, examine
from fedjax_sim.contract.setting import setting_of
from fedjax_sim.core import Transform
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.mlp import mlp
from fedjax_sim.privacy import local
from fedjax_sim.privacy.local import additive
from fedjax_sim.privacy.secure.aggregators import secure_sum
from fedjax_sim.sampling import Sampler
from fedjax_sim.tasks.lora import with_lora
from fedjax_sim.transforms import TRANSFORMS, ef21, error_feedback, hadamard
from fedjax_sim.transforms.eden import normal_levels
from fedjax_sim.transforms.qsgd import elias_omega_bits
from fedjax_sim.transforms.ranks import largest
from fedjax_sim.transforms.rotated import top_level
from problems import (
  blobs,
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
)
from tiers import slow_but

COMPRESSORS = [n for n in TRANSFORMS if n not in ("adaptive_clip", "clip")]
COMPRESSORS = [n for n in COMPRESSORS if n not in ("gaussian", "quantize")]
SHAPES = {"a": (5, 3), "b": (6,), "c": (), "d": (0, 4), "e": (5, 2)}  # 32


def normals(seed=0, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return {k: np.float32(rng.normal(0.2, 1, s)) for k, s in shapes.items()}


@functools.cache
def compiled(transform, batched):
  def one(update, key):
    hparams = jax.tree.map(jnp.float32, dict(transform.hparams))
    shared = transform.init(update, hparams)
    state = transform.client_init(update, hparams)
    return transform.apply(update, shared, state, hparams, key)

  axes = {"keys": (None, 0), "updates": (0, None), "": None}[batched]
  return jax.jit(jax.vmap(one, axes) if batched else one)


def sent(transform, update, seed=0):
  """What one client sends, as it is decoded, and its bytes."""
  result = compiled(_keyed(transform), "")(update, jax.random.key(seed))
  return jax.tree.map(np.asarray, result.update), float(result.bytes)


def sent_often(transform, update, count):
  """Decoded vectors of many keys, (count, size), float64; bytes, (count,)."""
  keys = jax.random.split(jax.random.key(1), count)
  result = compiled(_keyed(transform), "keys")(update, keys)
  leaves = [np.asarray(x, float) for x in jax.tree.leaves(result.update)]
  rows = [x.reshape(count, -1) for x in leaves if x.size]
  return np.concatenate(rows, axis=1), np.asarray(result.bytes)


class _Keyed:
  """A transform by its identity, as a key of a cache."""

  def __init__(self, transform: Transform):
    self.of = transform

  def __getattr__(self, name):
    return getattr(self.of, name)


@functools.cache
def _by_name(name, arguments):
  return _Keyed(TRANSFORMS[name](**dict(arguments)))


def _keyed(transform):
  return transform if isinstance(transform, _Keyed) else _Keyed(transform)


def made(name, **arguments):
  return _by_name(name, tuple(arguments.items()))


# --- unbiased, and how far off ------------------------------------------------


def qsgd_error(x, levels, bucket, norm):
  total = 0.0
  for start in range(0, x.size, bucket):
    part = x[start : start + bucket]
    length = np.linalg.norm(part, 2 if norm == "l2" else np.inf)
    place = np.abs(part) / length * levels
    share = place - np.floor(place)
    total += np.sum((length / levels) ** 2 * share * (1 - share))
  return total


def terngrad_error(leaves):
  each = [np.abs(x) for x in leaves if x.size]
  return sum(np.sum(x * (x.max() - x)) for x in each)


UNBIASED: dict[str, tuple[str, dict]] = {
  "l2": ("qsgd", {"levels": 3, "bucket": 12}),
  "max": ("qsgd", {"levels": 1, "norm": "max", "coding": "fixed"}),
  "terngrad": ("terngrad", {}),
  "random_k": ("random_k", {"share": 0.25}),
}


@pytest.mark.parametrize("case", slow_but(["l2", "terngrad"], UNBIASED))
def test_the_mean_is_the_update_and_the_error_that_of_the_paper(case):
  name, arguments = UNBIASED[case]
  update, count = normals(), 1000
  leaves = [np.asarray(x, float) for x in jax.tree.leaves(update)]
  x = flat(update).astype(float)
  expected = {
    "l2": lambda: qsgd_error(x, 3, 12, "l2"),
    "max": lambda: qsgd_error(x, 1, 512, "max"),
    "terngrad": lambda: terngrad_error(leaves),
    "random_k": lambda: (32 / 8 - 1) * np.sum(x**2),
  }[case]()
  rows, _ = sent_often(made(name, **arguments), update, count)
  spread = rows.std(axis=0) + 1e-6
  assert np.all(np.abs(rows.mean(axis=0) - x) < 5 * spread / count**0.5)
  errors = np.sum((rows - x) ** 2, axis=1)
  slack = 5 * errors.std() / count**0.5 + 1e-4 * expected
  assert abs(errors.mean() - expected) < slack
  if name == "qsgd":  # lemma 3.1, bucket by bucket
    assert expected <= np.sum(x**2) * min(12 / 9, 12**0.5 / 3) or case == "max"


def test_rotated_levels_are_unbiased_given_the_rotation():
  update, count = normals(), 1000
  x = flat(update).astype(float)
  rows, _ = sent_often(made("rotated", bits=2, block=8), update, count)
  spread = rows.std(axis=0)
  assert np.all(np.abs(rows.mean(axis=0) - x) < 5 * spread / count**0.5)
  keys = jax.random.split(jax.random.key(1), count)
  turn = lambda key: hadamard.rotate(
    jnp.float32(x), jax.random.split(key)[0], 8
  )
  turned = np.asarray(jax.jit(jax.vmap(turn))(keys), float)
  np.testing.assert_allclose(
    np.sum(turned**2, axis=(1, 2)), np.sum(x**2), rtol=1e-5
  )
  gap = np.ptp(turned, axis=2, keepdims=True) / 3
  place = (turned - turned.min(axis=2, keepdims=True)) / gap % 1
  expected = np.sum(gap**2 * place * (1 - place), axis=(1, 2))
  errors = np.sum((rows - x) ** 2, axis=1)
  off = errors - expected
  assert abs(off.mean()) < 5 * off.std() / count**0.5


@pytest.mark.parametrize("length", [1, 64])
def test_the_transform_is_the_matrix(length):
  x = np.random.default_rng(0).normal(size=(3, length)).astype(np.float32)
  found = jax.jit(hadamard.hadamard)(x)
  expected = x @ scipy.linalg.hadamard(length)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  key, odd = jax.random.key(3), jnp.asarray(x.ravel()[:23])
  for block in (None, 8):
    there_and_back = lambda x, block=block: hadamard.rotate_back(
      hadamard.rotate(x, key, block), key, x.size
    )
    back = jax.jit(there_and_back)(odd)
    np.testing.assert_allclose(back, odd, atol=1e-5)


CODES: list[tuple[str, dict, float]] = [
  ("drive", {"unbiased": True}, np.pi / 2 - 1),
  ("drive", {"unbiased": False}, 1 - 2 / np.pi),
  ("eden", {"bits": 3}, 0.0358),  # 1 / (1 - 0.03454) - 1, of Max's table
]


def turned_alike(x, count, block):
  """Rotations that `drive` and `eden` have drawn, (count, blocks, block)."""
  keys = jax.random.split(jax.random.key(1), count)
  turn = lambda key: hadamard.rotate(jnp.float32(x), key, block)
  return np.asarray(jax.jit(jax.vmap(turn))(keys), float)


@pytest.mark.parametrize(
  ("name", "arguments", "usual"),
  slow_but(
    [CODES[0], CODES[2]],
    CODES,
  ),
)
def test_rotated_codes_have_the_errors_of_their_papers(name, arguments, usual):
  x, count = normals(2, {"w": (512,)})["w"].astype(float), 300
  rows, _ = sent_often(made(name, **arguments), {"w": jnp.float32(x)}, count)
  errors = np.sum((rows - x) ** 2, axis=1) / np.sum(x**2)
  (turned,) = np.moveaxis(turned_alike(x, count, None), 1, 0)
  square, taxicab = np.sum(x**2), np.abs(turned).sum(axis=1)
  if name == "eden":
    levels = normal_levels(3)
    near = turned * (x.size / square) ** 0.5
    q = levels[np.abs(near[..., None] - levels).argmin(axis=-1)]
    product = np.sum(turned * q, axis=1)
    expected = square * np.sum(q**2, axis=1) / product**2 - 1
  elif arguments["unbiased"]:
    expected = x.size * square / taxicab**2 - 1
  else:
    expected = 1 - taxicab**2 / (x.size * square)
  np.testing.assert_allclose(errors, expected, rtol=2e-3)
  assert errors.mean() == pytest.approx(usual, rel=0.04)
  if usual > 0.5 or name == "eden":  # unbiased, nearly
    off = np.linalg.norm(rows.mean(axis=0) - x) / square**0.5
    assert off < 1.2 * (usual / count) ** 0.5


def test_levels_of_the_normal_distribution():
  """Max 1960, table 1: the mean squared errors of 2, 4, 8 and 16 levels."""
  grid = np.linspace(-8, 8, 400_001)
  density = stats.norm.pdf(grid) * (grid[1] - grid[0])
  for bits, error in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
    levels = normal_levels(bits)
    code = np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)
    found = np.sum((grid - levels[code]) ** 2 * density)
    assert found == pytest.approx(error, rel=1e-3)


# --- bytes: encoders ----------------------------------------------------------


def omega(number):
  """The Elias omega code of a whole number >= 1, as text."""
  code = "0"
  while number > 1:
    digits = f"{number:b}"
    code, number = digits + code, len(digits) - 1
  return code


def read_omega(bits, at):
  number = 1
  while bits[at] == "1":
    width = number + 1
    number, at = int(bits[at : at + width], 2), at + width
  return number, at + 1


def sparse_code(levels):
  text, last = "", np.int64(-1)
  for i in np.flatnonzero(levels):
    text += omega(i - last) + "01"[int(levels[i] < 0)] + omega(abs(levels[i]))
    last = i
  return text + omega(len(levels) - last)


def dense_code(levels):
  sign = lambda x: "" if x == 0 else "01"[int(x < 0)]
  return "".join(omega(abs(x) + 1) + sign(x) for x in levels)


def read_sparse(bits, size):
  levels, at, place = np.zeros(size, int), 0, -1
  while True:
    gap, at = read_omega(bits, at)
    place += gap
    if place == size:
      return levels
    sign, at = 1 - 2 * int(bits[at]), at + 1
    level, at = read_omega(bits, at)
    levels[place] = sign * level


def test_lengths_of_elias_omega_codes():
  numbers = [1, 2, 3, 4, 7, 8, 15, 16, 100, 2**16, 2**31 - 1]
  found = jax.jit(elias_omega_bits)(jnp.asarray(numbers, jnp.int32))
  assert found.tolist() == [len(omega(n)) for n in numbers]


@pytest.mark.parametrize(
  ("levels", "scale"), slow_but([(7, 1.0)], [(1, 1.0), (7, 1.0), (300, 1e30)])
)
def test_qsgd_is_as_long_as_its_code(levels, scale):
  update = jax.tree.map(lambda x: np.float32(x * scale), normals(3))
  decoded, size = sent(made("qsgd", levels=levels, bucket=20), update)
  x, out = flat(update).astype(float), flat(decoded).astype(float)
  whole = np.zeros(x.size, int)
  for part in (slice(0, 20), slice(20, 32)):
    place = out[part] / np.linalg.norm(x[part]) * levels
    whole[part] = np.round(place)
    np.testing.assert_allclose(place, whole[part], atol=1e-4 * levels)
  sparse, dense = sparse_code(whole), dense_code(whole)
  np.testing.assert_array_equal(read_sparse(sparse, x.size), whole)
  assert size == 2 * 4 + math.ceil((1 + min(len(sparse), len(dense))) / 8)
  fixed = made("qsgd", levels=levels, bucket=20, coding="fixed")
  width = 1 + math.ceil(math.log2(levels + 1))
  assert sent(fixed, update)[1] == 2 * 4 + math.ceil(32 * width / 8)


def test_terngrad_packs_five_signs_into_a_byte():
  update = normals(4)
  decoded, size = sent(made("terngrad"), update)
  scales = [np.abs(x).max() for x in update.values() if x.size]
  signs = np.sign(flat(decoded)).astype(int) + 1
  rows = np.pad(signs, (0, -len(signs) % 5)).reshape(-1, 5)
  stream = np.array(scales, np.float32).tobytes()
  stream += (rows @ 3 ** np.arange(5)).astype(np.uint8).tobytes()
  assert size == len(stream)
  codes = np.frombuffer(stream[16:], np.uint8)
  back = (codes[:, None] // 3 ** np.arange(5) % 3).ravel()[:32] - 1
  read = np.repeat(np.frombuffer(stream[:16], np.float32), (15, 6, 1, 10))
  np.testing.assert_allclose(flat(decoded), back * read, rtol=1e-6)


def test_terngrad_clips_at_deviations_but_not_what_is_alike():
  update = {**normals(4), "same": np.full((7, 9), 0.1, np.float32)}
  decoded, _ = sent(made("terngrad", clip=1.2), update)
  np.testing.assert_allclose(decoded["same"], 0.1, rtol=1e-6)
  for name in ("a", "b", "e"):
    bound = 1.2 * update[name].astype(float).std()
    assert bound < np.abs(update[name]).max()
    out = np.abs(decoded[name])
    np.testing.assert_allclose(out[out > 0], bound, rtol=1e-5)


def sign_code(x):
  """Signs; before them which entries are 0, if some are; nothing if all."""
  signs = np.packbits(x[x != 0] < 0).tobytes()
  some = 0 < np.sum(x == 0) < x.size
  return (np.packbits(x == 0).tobytes() if some else b"") + signs


def read_signs(stream, size):
  bits = np.unpackbits(np.frombuffer(stream, np.uint8))
  whole, out = math.ceil(size / 8), np.zeros(size)
  if len(stream) == whole:
    return 1.0 - 2.0 * bits[:size]
  if stream:
    there = bits[:size] == 0
    out[there] = 1.0 - 2.0 * bits[8 * whole :][: there.sum()]
  return out


@pytest.mark.parametrize("there", [0, 1, 8, 12, 13])
def test_signs_are_decoded_from_their_code(there):
  x = np.where(np.arange(13) < there, -normals(3, {"w": (13,)})["w"], 0)
  decoded, size = sent(made("signsgd"), {"w": np.float32(x)})
  stream = sign_code(x)
  np.testing.assert_array_equal(read_signs(stream, 13), np.sign(x))
  np.testing.assert_array_equal(decoded["w"], np.sign(x))
  assert size == len(stream)


def test_no_code_has_more_than_its_bits():
  bits = jnp.arange(1, 17, dtype=jnp.float32)
  found = jax.jit(top_level)(bits)
  assert found.tolist() == [2**b - 1 for b in range(1, 17)]


def top_code(x, count):
  """Values, and the shorter one of a bitmap and of indices; decoded again."""
  kept = np.sort(np.argsort(-np.abs(x), kind="stable")[:count])
  bitmap = np.isin(np.arange(x.size), kept)
  width = math.ceil(math.log2(x.size))
  digits = kept[:, None] >> np.arange(width)[::-1] & 1
  ways = np.packbits(bitmap), np.packbits(digits.astype(np.uint8))
  stream = x[kept].tobytes() + min(ways, key=len).tobytes()
  rest = np.unpackbits(np.frombuffer(stream[x.itemsize * count :], np.uint8))
  if len(ways[1]) < len(ways[0]):
    read = rest[: count * width].reshape(count, width)
    places = read @ (1 << np.arange(width)[::-1])
  else:
    places = np.flatnonzero(rest[: x.size])
  out = np.zeros_like(x)
  out[places] = np.frombuffer(stream[: x.itemsize * count], x.dtype)
  return out, len(stream)


@pytest.mark.parametrize("share", [1e-4, 0.1, 0.3, 1.0])
def test_top_k_is_decoded_from_its_code(share):
  update = normals(5)
  x = np.round(flat(update), 1)  # with ties
  update = {"w": x, "d": update["d"]}
  out, size = top_code(x, max(1, round(share * x.size)))
  decoded, found = sent(made("top_k", share=share), update)
  np.testing.assert_array_equal(decoded["w"], out)
  assert found == size
  count = max(1, round(share * x.size))
  decoded, found = sent(made("random_k", share=share), update)
  assert found == 4 * count
  kept = decoded["w"] != 0
  assert kept.sum() <= count
  scaled = x[kept] * np.float32(x.size / count)
  np.testing.assert_allclose(decoded["w"][kept], scaled, rtol=1e-6)


def test_the_largest_are_exactly_so_many():
  numbers = jnp.asarray([3, 1, 3, 0, 3, 2], jnp.int32)
  found = [
    np.flatnonzero(largest(numbers, jnp.int32(k))).tolist() for k in range(1, 7)
  ]
  assert found[:4] == [[0], [0, 2], [0, 2, 4], [0, 2, 4, 5]]
  assert [len(x) for x in found] == [1, 2, 3, 4, 5, 6]


def test_bytes_by_hand():
  update = normals(6, {"w": (40, 30), "b": (30,)})  # 1,230 entries: 2,048
  sizes = {
    ("signsgd", ()): math.ceil(1230 / 8),
    ("signsgd", (("scaling", True),)): math.ceil(1230 / 8) + 2 * 4,
    ("drive", ()): 2048 / 8 + 4,
    ("eden", (("bits", 3), ("block", 512))): 3 * 1536 / 8 + 3 * 4,
    ("rotated", (("bits", 5), ("block", None))): 5 * 2048 / 8 + 8,
    ("power_sgd", ()): 4 * (2 * (40 + 30) + 30),
    ("product_quantization", ()): 4 * 16 * 4 + math.ceil(308 * 4 / 8),
  }
  for (name, arguments), size in sizes.items():
    assert sent(_by_name(name, arguments), update)[1] == size, name
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), update)
  assert sent(made("power_sgd", rank=8), half)[1] == 4 * 8 * (40 + 30) + 60
  whole, size = sent(made("power_sgd", rank=9), half)  # 2,400 as they are
  assert size == 2 * 1230 < 4 * 9 * (40 + 30)
  np.testing.assert_array_equal(whole["w"], half["w"])
  kept = 123 * 2 + min(123 * 11 / 8, 1230 / 8)
  assert sent(made("top_k", share=0.1), half)[1] == math.ceil(kept)


# --- biased ones --------------------------------------------------------------


def error_of(out, x):
  return np.sum((flat(out).astype(float) - flat(x)) ** 2)


def lloyd(pieces, count):
  """The centroids of pieces after five steps from the transform's own start."""
  first = jax.random.choice(
    jax.random.key(0), len(pieces), (count,), replace=False
  )
  means = pieces[np.asarray(first)]
  for _ in range(5):
    own = np.sum((pieces[:, None] - means) ** 2, axis=2).argmin(axis=1)
    for k in set(own):
      means[k] = pieces[own == k].mean(axis=0)
  return means[own]


def test_biased_ones_shrink_what_is_left():
  update = normals(7, {"w": (24, 20), "b": (32,)})
  x = flat(update).astype(float)
  square = np.sum(x**2)
  out, _ = sent(made("top_k", share=0.1), update)
  smallest = np.sort(np.abs(x))[: x.size - 51]
  assert error_of(out, update) == pytest.approx(np.sum(smallest**2), rel=1e-5)
  assert error_of(out, update) <= (1 - 51 / 512) * square
  out, _ = sent(made("signsgd", scaling=True), update)
  taxicab = sum(np.abs(a).sum() ** 2 / a.size for a in update.values())
  assert error_of(out, update) == pytest.approx(square - taxicab, rel=1e-5)
  rows, _ = sent_often(made("random_k", share=0.1, unbiased=False), update, 400)
  errors = np.sum((rows - x) ** 2, axis=1)
  expected = (1 - 51 / 512) * square
  assert abs(errors.mean() - expected) < 5 * errors.std() / 400**0.5
  out, _ = sent(made("product_quantization"), update)
  pieces = flat(out).astype(float).reshape(-1, 4)
  assert len(np.unique(pieces, axis=0)) <= 16
  left = square - np.sum(pieces**2)  # centroids are means
  assert error_of(out, update) == pytest.approx(left, rel=1e-4)
  assert left < 0.75 * square
  np.testing.assert_allclose(pieces, lloyd(x.reshape(-1, 4), 16), atol=1e-5)
  out, _ = sent(made("drive", unbiased=False), update)  # a projection
  left = square - np.sum(flat(out).astype(float) ** 2)
  assert error_of(out, update) == pytest.approx(left, rel=1e-4)


def test_power_sgd_projects_and_warms_up_to_the_best_rank():
  update = normals(8, {"w": (2, 6, 9), "b": (9,), "small": (2, 2)})
  transform = transforms.power_sgd(2)
  state = transform.client_init(update, {})
  apply = jax.jit(transform.apply)
  matrix = update["w"].reshape(12, 9).astype(float)
  values = np.linalg.svd(matrix, compute_uv=False)
  square, best = np.sum(values**2), np.sum(values[2:] ** 2)
  errors = []
  for _ in range(60):
    result = apply(update, (), state, {}, jax.random.key(0))
    state, out = result.state, np.asarray(result.update["w"], float)
    assert np.linalg.matrix_rank(out.reshape(12, 9), tol=1e-4) == 2
    errors.append(np.sum((out - update["w"]) ** 2))
    # A projection takes away what it keeps.
    assert errors[-1] == pytest.approx(square - np.sum(out**2), rel=1e-4)
  assert best <= errors[-1] * (1 + 1e-5) < errors[0]
  assert errors[-1] == pytest.approx(best, rel=1e-3)
  for name in ("b", "small"):  # as they are
    np.testing.assert_array_equal(result.update[name], update[name])


# --- all of them --------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSORS)
def test_zeros_tiny_huge_and_nan(name):
  base = normals(9)
  scales = np.array(
    [0, 1, 2.0**-90, 2.0**100, np.nan], np.float32
  )  # 2^100 = 1.3e30
  updates = jax.tree.map(lambda x: x * scales.reshape(-1, *(1,) * x.ndim), base)
  result = compiled(made(name), "updates")(updates, jax.random.key(0))
  zero, one, tiny, huge, nan = (
    flat(jax.tree.map(lambda x, i=i: np.asarray(x[i]), result.update))
    for i in range(5)
  )
  assert not np.all(np.isfinite(nan))
  np.testing.assert_array_equal(zero, 0)
  if name == "signsgd":
    for x in (one, tiny, huge):
      np.testing.assert_array_equal(x, np.sign(flat(base)))
    assert result.bytes.tolist()[:2] == [0, 4]  # nothing; 32 signs
    return
  assert np.any(one != 0)
  np.testing.assert_allclose(tiny * 2.0**90, one, rtol=1e-5)
  np.testing.assert_allclose(huge / np.float32(2.0**100), one, rtol=1e-5)
  assert len(set(np.asarray(result.bytes)[1:4].tolist())) == 1


@pytest.mark.parametrize("name", COMPRESSORS)
def test_dtypes_and_empty_updates(name):
  update = {
    "a": jnp.asarray(normals()["a"], jnp.bfloat16),
    "d": jnp.zeros((0, 4)),
    "b": jnp.asarray(normals()["b"]),
  }
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  result = jax.eval_shape(compiled(made(name), ""), update, jax.random.key(0))
  assert kinds(result.update) == kinds(update)
  assert (result.bytes.shape, result.bytes.dtype) == ((), jnp.float32)
  nothing = {"d": jnp.zeros((0, 4))}
  for empty in (nothing, {}):
    out, size = sent(made(name), empty)
    assert kinds(out) == kinds(empty)
    assert size == 0


CHEAP = ("dtypes and shapes", "promises")
# Of nearly parallel columns the basis depends on how they were rounded.
ROUNDED = ("lanes", "devices", "absent clients")


@pytest.mark.parametrize("name", slow_but(["qsgd"], COMPRESSORS))
def test_ours_keep_the_contract(name):
  checks = [c for c in CHECKS if c.name in CHEAP or name != "qsgd"]
  if name == "power_sgd":
    checks = [c for c in checks if c.name not in ROUNDED]
  lines = list(examine(setting_of(TRANSFORMS[name]), checks))
  assert [line for line in lines if line.failed] == []


@pytest.mark.parametrize(
  ("name", "arguments", "error", "match"),
  [
    ("qsgd", {"levels": 0}, ValueError, "levels=0 .* 1 to 32767"),
    ("qsgd", {"norm": "l1"}, ValueError, "norm='l1'.*l2"),
    ("qsgd", {"coding": "gamma"}, ValueError, "coding='gamma'.*elias"),
    ("top_k", {"share": 0}, ValueError, "share=0.0 .*> 0"),
    ("random_k", {"share": 1.5}, ValueError, "share=1.5 .*<= 1"),
    ("rotated", {"block": 12}, ValueError, "block=12 is no power of two"),
    ("drive", {"block": 0}, ValueError, "block=0 is no power of two"),
    ("eden", {"block": 8.0}, TypeError, "block=8.0 is a float"),
    ("eden", {"bits": 9}, ValueError, "bits=9 .*1 to 8"),
    ("power_sgd", {"rank": 0}, ValueError, "rank=0"),
    ("terngrad", {"clip": -1}, ValueError, "clip=-1.0"),
  ],
)
def test_refused(name, arguments, error, match):
  with pytest.raises(error, match=match):
    TRANSFORMS[name](**arguments)


# --- rounds -------------------------------------------------------------------


def movers(centres, curvatures=None, **more):
  """One step of rate 1: a client's update is its centre minus the params."""
  centres = np.asarray(centres)
  task = quadratic(centres.shape[1])
  return make_simulator(
    task,
    fedavg(task, sgd(more.pop("rate", 1.0)), sgd(1.0), weighting="uniform"),
    quadratic_data(centres, curvatures),
    batching=LocalBatching(batch_size=1),
    **more,
  )


def test_a_majority_votes_on_every_sign():
  rng = np.random.default_rng(10)
  centres = rng.normal(size=(4, 33))  # 4: there are ties
  vote = aggregators.AGGREGATORS["majority_vote"]()
  simulator = movers(
    centres, transforms=[transforms.signsgd()], aggregator=vote, lanes=2
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  expected = np.sign(np.sign(centres).sum(axis=0))
  assert set(expected) == {-1, 0, 1}
  np.testing.assert_array_equal(params_of(simulator, out.state)["w"], expected)
  assert out.rows[0]["bytes_up"] == 4 * (math.ceil(33 / 8) + 4)


def test_masked_or_noisy_numbers_are_sent_whatever_a_transform_saved():
  """Every number of a masked update takes its bits, zeros included."""
  centres = np.random.default_rng(12).normal(size=(4, 33))
  chain = [transforms.top_k(0.1)]
  masked = secure_sum(4, clip=8.0, bits=12)
  simulator = movers(centres, transforms=chain, aggregator=masked)
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  assert out.rows[0]["top_k/bytes"] == 3 * 4 + math.ceil(3 * 6 / 8)
  assert out.rows[0]["bytes_up"] == 4 * (math.ceil(33 * 12 / 8) + 4)
  task, data = quadratic(33), quadratic_data(centres)
  base = fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform")
  for randomizer, coded in (
    (additive.gaussian(1.0, epsilon=2.0, delta=1e-3), False),
    (additive.clip_only(1.0), True),
  ):
    simulator = make_simulator(
      task, local.with_local_dp(base, randomizer), data, transforms=chain
    )
    assert simulator.traffic.coded == coded
    assert simulator.traffic.update == 4 * 33


def top_of(x, count):
  out = np.zeros_like(x)
  kept = np.argsort(-np.abs(x), kind="stable")[:count]
  out[kept] = x[kept]
  return out


def test_ef21_follows_the_recursion_of_each_client():
  rng = np.random.default_rng(11)
  centres = rng.normal(size=(4, 6))
  centres[3, 0] = 1e30
  cohorts = [[0, 1], [2, 3], [0, 2, 3], [1], [0, 1, 2]]
  simulator = movers(
    centres,
    [1, 1, 1, 1e30],  # the last client's update is not finite
    rate=0.5,
    lanes=3,
    transforms=[ef21(transforms.top_k(2 / 6))],
    sampler=Sampler(
      sample=lambda seed, round_: np.array(cohorts[round_]),
      sizes=(3,),
      expected=2,
    ),
  )
  state, w, known = simulator.init(), np.zeros(6), np.zeros((4, 6))
  for round_, ids in enumerate(cohorts):
    out = simulator.dispatch(state, simulator.plan(round_, 1))
    state = out.state
    present = [k for k in ids if k != 3]
    for k in present:
      known[k] += top_of(0.5 * (centres[k] - w) - known[k], 2)
    w = w + known[present].mean(axis=0)
    np.testing.assert_allclose(
      params_of(simulator, state)["w"], w, rtol=1e-5, atol=1e-6
    )
    _, (own,) = state.clients
    np.testing.assert_allclose(own.known["w"][:4], known, atol=1e-6)
    assert out.rows[0]["top_k/bytes"] == 2 * 4 + 1  # a bitmap of 6 bits


def test_ef21_refuses_noise():
  with pytest.raises(ValueError, match=r"gaussian\.ef21=True would add up"):
    ef21(transforms.gaussian(1.0))
  with pytest.raises(TypeError, match="ef21: transform"):
    ef21(transforms.top_k)  # type: ignore[arg-type]


def test_adapters_are_compressed():
  data = blobs([4, 5, 6], features=6, classes=3)
  task = with_lora(
    mlp((6,), 3, (5,)),
    rank=2,
    targets=("layers/0/kernel",),
    also=("layers/1/",),
  )
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.5), sgd(1.0)),
    data,
    transforms=[error_feedback(transforms.qsgd(7, coding="fixed"))],
    lanes=3,
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  numbers = 6 * 2 + 2 * 5 + 5 * 3 + 3  # A, B, and the second layer
  assert simulator.states.num_parameters == numbers
  assert out.rows[0]["qsgd/bytes"] == 4 + numbers * 4 / 8
  assert out.rows[0]["bytes_up"] == 3 * (4 + numbers * 4 / 8 + 4)
