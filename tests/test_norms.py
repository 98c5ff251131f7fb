"""Norms and clipping, against double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim import transforms
from fedjax_sim.core.tree import (
  bounded,
  clip_to_unit_norm,
  clipped_by_layer,
  fits,
  in_dtype,
  tree_norm,
)
from fedjax_sim.engine.client_log import cosine, gradient_statistics
from fedjax_sim.privacy.leakage.words import guessed
from fedjax_sim.training import several_models
from problems import flat


def floats(most):
  """Of any size up to `most`; no subnormals, which the devices flush to 0."""
  return st.floats(-most, most, width=32, allow_subnormal=False)


def trees(most):
  leaf = lambda shape: hnp.arrays(np.float32, shape, elements=floats(most))
  return st.fixed_dictionaries({"b": leaf((3,)), "w": leaf((2, 4))})


BOUNDS = st.floats(2.0**-20, 2.0**20, width=32)
jitted_length = jax.jit(tree_norm, static_argnums=1)
jitted = jax.jit(clip_to_unit_norm, static_argnums=2)
jitted_by_layer = jax.jit(clipped_by_layer, static_argnums=2)


def exact(tree, order):
  return np.linalg.norm(flat(tree).astype(np.float64), order)


@pytest.mark.parametrize("order", [1, 2])
@given(tree=trees(2.0**100))
def test_lengths(order, tree):
  np.testing.assert_allclose(
    float(jitted_length(tree, order)), exact(tree, order), rtol=1e-5, atol=1e-30
  )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("clip", [jitted, jitted_by_layer])
@given(tree=trees(2.0**100), bound=BOUNDS)
def test_what_is_clipped_never_exceeds_its_bound(order, clip, tree, bound):
  assert exact(clip(tree, bound, order), order) <= 1


@pytest.mark.parametrize("order", [1, 2])
def test_not_with_millions_of_numbers_either(order):
  rng = np.random.default_rng(0)
  for tree in (np.full(4_000_000, 0.3), rng.exponential(size=4_000_000)):
    cut = jitted({"w": tree.astype(np.float32)}, 0.5, order)
    assert 1 - 1e-4 < exact(cut, order) <= 1


@pytest.mark.parametrize("order", [1, 2])
@given(tree=trees(1.0), bound=st.floats(11.5, 2.0**20, width=32))
def test_what_is_short_is_only_divided(order, tree, bound):
  found = flat(jitted(tree, bound, order))
  np.testing.assert_allclose(found * bound, flat(tree), rtol=3e-5, atol=1e-6)


def test_layers_have_equal_shares():
  tree = {"a": np.full(4, 100.0, np.float32), "b": np.ones(9, np.float32)}
  for order, share in ((1, 1 / 2), (2, 2**-0.5)):
    cut = jitted_by_layer(tree, 1.0, order)
    for leaf in cut.values():
      np.testing.assert_allclose(np.linalg.norm(leaf, order), share, rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_zeros_stay_zeros_whatever_the_bound(order):
  for bound in (0.0, 1e-38, 1.0, np.float32(np.inf)):
    assert not jitted({"w": np.zeros(3, np.float32)}, bound, order)["w"].any()


def test_leaves_that_compilers_know():
  """XLA must not square them and the power of two apart, which overflows."""
  for known in (0.0, 1e-30):
    for size in (0.0, 1e-25, 1.0):
      tree = lambda x, known=known: {"b": jnp.full(3, known), "w": x}
      x = jnp.full(2, size)
      expected = exact(tree(x), 2)
      found = jax.jit(lambda x, tree=tree: tree_norm(tree(x)))(x)
      np.testing.assert_allclose(found, expected, rtol=1e-6)
      cut = jax.jit(lambda x, tree=tree: clip_to_unit_norm(tree(x), 0.0))(x)
      unit = 1.0 if expected else 0.0
      np.testing.assert_allclose(exact(cut, 2), unit, rtol=1e-5)


def test_more_than_float32_holds(x64):
  cut = clip_to_unit_norm({"w": np.array([1e300, 1.0])}, 1.0)["w"]
  np.testing.assert_allclose(cut, [1.0, 0.0], rtol=1e-4)


# --- rows of a vmap, where compilers multiply by reciprocals ------------------

SIZES = [1e-36, 1.0, 2.0**125, 2.0**126, 1.5e38]


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_any_size(size):
  """Each row of a vmap has its own size; the largest is finite."""
  rng = np.random.default_rng(0)
  rows = rng.uniform(0.5, 1, (3, 5)) * rng.choice([-1, 1], (3, 5))
  tree = {"w": (size * rows).astype(np.float32)}
  exact_ = np.linalg.norm(tree["w"].astype(np.float64), axis=1)
  tree["w"][2] = 0
  exact_[2] = 0
  tiny = 1e-37  # devices may flush what is smaller
  np.testing.assert_allclose(
    jax.vmap(tree_norm)(tree), exact_.astype(np.float32), rtol=1e-6, atol=tiny
  )
  for bound in (1e-3, 1.0, 1e30):
    short = np.minimum(exact_, bound)
    cut = jax.jit(jax.vmap(lambda t, b=bound: bounded(t, b)))(tree)["w"]
    found = np.linalg.norm(np.asarray(cut, np.float64), axis=1)
    assert np.all(found <= bound)
    np.testing.assert_allclose(found, short, rtol=1e-5, atol=tiny)
    clip, key = transforms.clip(1.0).apply, jax.random.key(0)
    rows = jax.vmap(clip, (0, None, None, None, None), 0)
    cut = jax.jit(rows)(tree, (), (), {"norm": bound}, key).update["w"]
    found = np.asarray(cut, np.float64)
    np.testing.assert_allclose(
      np.linalg.norm(found, axis=1), short, rtol=1e-5, atol=tiny
    )


@pytest.mark.parametrize("size", SIZES)
def test_directions_of_any_size(size):
  times = lambda numbers: np.array(size * np.array(numbers), np.float32)
  found = jax.jit(jax.vmap(cosine))(
    times([[1, 0], [1, 1]]), times([[1, 0], [0, 1]])
  )
  np.testing.assert_allclose(found, [1, 0.5**0.5], rtol=1e-6)
  seen = jax.jit(jax.vmap(gradient_statistics))(times([[1, 0], [0.5, 0.5]]))
  np.testing.assert_allclose(seen["norm"], times([1, 0.5**0.5]), rtol=1e-6)
  rows = times([[[0, 0], [1, 0.5], [0.6, 0.6]]] * 2)
  words = jax.jit(jax.vmap(guessed))(rows, np.array([1, 2]))
  np.testing.assert_array_equal(words, [[0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
  ("tree", "order", "expected"),
  [
    ((), 2, True),
    ({"a": [0.6], "b": [0.8]}, 2, True),
    ({"a": [0.6], "b": [0.8]}, 1, False),
    ({"a": [0.5, -0.5]}, 1, True),
    ({"a": [0.6, 0.81]}, 2, False),
    ({"a": [0.0, np.nan]}, 2, False),
    ({"a": [-np.inf]}, 1, False),
    ({"a": [3e38, 0.0]}, 2, False),
  ],
)
def test_what_fits(tree, order, expected):
  tree = {k: np.float32(v) for k, v in dict(tree).items()}
  assert bool(jax.jit(fits, static_argnums=1)(tree, order)) == expected


def test_means_of_integers_are_the_nearest():
  """Also of twelve models, whose shares do not add up to 1 in float32."""
  close = jnp.float32([2.9999998, 3.2, -1.9999999])
  assert in_dtype(close, jnp.int32).tolist() == [3, 3, -2]
  assert in_dtype(close, jnp.float32).tolist() == close.tolist()
  counts = jnp.broadcast_to(jnp.arange(30), (12, 30))
  mean = several_models.mean(({}, counts), jnp.ones(12), ())
  np.testing.assert_array_equal(mean.buffers, np.arange(30))
