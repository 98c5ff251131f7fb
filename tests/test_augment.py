"""Augmentation: what it leaves alone, and what it may do to an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.data.augment import augment

KEY = jax.random.key(0)


def images(n=12, height=9, width=7, channels=2, seed=0):
  rng = np.random.default_rng(seed)
  shape = (n, height, width, channels)
  return rng.uniform(0, 1, shape).astype(np.float32)


JITTED = jax.jit(augment, static_argnames=("operations", "flip"))


def changed(x, seed=0, magnitude=0.8, **options):
  return np.asarray(JITTED(jax.random.key(seed), x, magnitude, **options))


@pytest.mark.parametrize("shape", [(4, 9, 7, 2), (4, 9), (4,)])
def test_magnitude_0_and_no_operation_change_nothing(shape):
  x = images(4).reshape(-1)[: int(np.prod(shape))].reshape(shape)
  np.testing.assert_array_equal(changed(x, magnitude=0.0, operations=9), x)
  np.testing.assert_array_equal(changed(x, magnitude=0.0, flip=True), x)
  if len(shape) > 2:
    np.testing.assert_array_equal(changed(x, operations=0), x)
  assert changed(x).shape == shape


@given(
  seed=st.integers(0, 2**32 - 1),
  magnitude=st.floats(0, 1, width=32),
  low=st.floats(-3, 1, width=32),
  flip=st.booleans(),
)
def test_pixels_stay_in_their_images_range(seed, magnitude, low, flip):
  x = images(6, seed=seed % 7) + np.float32(low)
  found = changed(x, seed, magnitude, operations=4, flip=flip)
  axes = (1, 2, 3)
  assert (found >= x.min(axes, keepdims=True) - 1e-5).all()
  assert (found <= x.max(axes, keepdims=True) + 1e-5).all()


def test_the_key_and_the_image_decide():
  x = images()
  np.testing.assert_array_equal(changed(x, 3), changed(x, 3))
  assert not np.array_equal(changed(x, 3), changed(x, 4))
  np.testing.assert_allclose(
    augment(jax.random.key(3), x, 0.8), changed(x, 3), atol=1e-6
  )
  # An example's change is its own, whatever the others are.
  other = np.concatenate([x[:5], images(7, seed=1)])
  np.testing.assert_array_equal(changed(x, 3)[:5], changed(other, 3)[:5])
  same = np.broadcast_to(x[:1], x.shape)
  assert len(np.unique(changed(same, 3), axis=0)) > 9


def test_it_is_stronger_with_the_magnitude():
  rows = np.linspace(0, 1, 20, dtype=np.float32)
  x = np.tile(rows[:, None] * rows[None, :], (300, 1, 1))
  gaps = [np.abs(changed(x, 0, m) - x).mean() for m in (0.1, 0.3, 0.6, 1.0)]
  assert 0 < gaps[0] < gaps[1] < gaps[2] < gaps[3] < 0.2


def test_an_image_gets_one_operation_and_each_has_its_turn():
  """A bright square on black: what changed tells the operation."""
  x = np.zeros((4000, 16, 16), np.float32)
  x[:, 5:9, 6:12] = 0.5
  x[:, 5:7, 6:8] = 1
  found = changed(x, 1, 1.0, operations=1, flip=True)
  kinds = {
    "same": (found == x).all((1, 2)),
    "mirrored": (found == x[:, :, ::-1]).all((1, 2)),
    "brighter": ((x == 0) <= (found == 0)).all((1, 2)),
    "contrast": np.abs(found[:, 0, 0] - found[:, -1, -1]) < 1e-6,
  }
  shares = {name: hit.mean() for name, hit in kinds.items()}
  assert abs(shares["mirrored"] - 1 / 18) < 0.02
  assert shares["same"] > 1 / 18 - 0.02  # the other half, and more
  without = changed(x, 1, 1.0, operations=1)
  assert not (without == x[:, :, ::-1]).all((1, 2)).any()


def test_a_shift_moves_and_repeats_the_edge():
  x = np.tile(np.arange(10, dtype=np.float32)[None, :, None], (500, 1, 10))
  found = changed(x, 2, 1.0, operations=1)
  moved = found - x
  inner = moved[:, 3:7]
  even = np.abs(inner - inner[:, :1, :1]).max((1, 2)) < 1e-4
  shifted = even & (np.abs(inner[:, 0, 0]) > 0.1)
  assert 20 < shifted.sum() < 120
  assert np.abs(inner[shifted]).max() <= 2.0001
  up = shifted & (inner[:, 0, 0] > 1)
  np.testing.assert_allclose(found[up][:, -1], 9, atol=1e-5)


@pytest.mark.parametrize("shape", [(4000, 3), (60, 187, 1)])
def test_other_examples_get_noise_and_ids_nothing(shape):
  x = np.zeros(shape, np.float32)
  noise = changed(x, magnitude=0.3)
  assert abs(noise.std() - 0.3) < 0.01
  assert abs(noise.mean()) < 0.01
  ids = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
  np.testing.assert_array_equal(changed(ids), ids)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_dtype_is_kept(dtype):
  x = jnp.asarray(images(), dtype)
  found = augment(KEY, x, jnp.float32(0.5))
  assert found.dtype == dtype
  zero = augment(KEY, x, jnp.float32(0))
  np.testing.assert_array_equal(zero, x)
