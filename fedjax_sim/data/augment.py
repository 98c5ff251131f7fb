"""Random changes of images that keep their class, on the device.

After Cubuk et al. 2020, "RandAugment: Practical automated data augmentation
with a reduced search space" (arXiv 1909.13719): every image gets a few
operations out of a list, all as strong as one magnitude says. Operations that
move pixels are one affine map, so that an image is interpolated once.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from fedjax_sim.core import Array, Key

# What magnitude 1 means at most.
_SHIFT = 0.2  # of a side
_ANGLE = math.pi / 6
_SHEAR = 0.3
_BLEND = 0.9  # factors of contrast and brightness go from 1 - this to 1 + this
_CUT = 0.5  # of a side
LEAST_SIDE = 4  # pixels; what is narrower is no image

_OPERATIONS = (
  "shift_rows",
  "shift_columns",
  "rotate",
  "shear_rows",
  "shear_columns",
  "contrast",
  "brightness",
  "cutout",
)


def augment(
  key: Key,
  x: Array,
  magnitude: Array | float,
  *,
  operations: int = 2,
  flip: bool = False,
) -> Array:
  """Return examples that look different and are of the same class.

  An image gets `operations` different ones of: a shift by up to 0.2 of a side,
  a rotation by up to 30 degrees, a shear by up to 0.3 (what moves in takes the
  value of the edge), contrast or brightness times 0.1 to 1.9, a cut-out, filled
  with the image's mean, of up to half of each side; with `flip` also its mirror
  image. How strong each is, and in which direction, is uniform up to the
  magnitude; mirrored are magnitude / 2 of those whose turn it is. No pixel
  leaves the range of its image's pixels.

  Args:
    key: the only source of randomness; every example has a key of its own.
    x: shape=(batch, height, width, channels) or (batch, height, width), images,
      floats. Other floats, among them those with a side below 4, such as
      signals, shape=(batch, time, channels), get Gaussian noise with the
      magnitude as standard deviation. Whole numbers, such as ids, stay as they
      are.
    magnitude: shape=(), from 0 to 1; 0 changes nothing.
    operations: how many an image gets.
    flip: whether mirror images have the same class.

  Returns:
    The changed examples, of the same shape and dtype as `x`.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  if x.ndim not in (3, 4) or min(x.shape[1:3]) < LEAST_SIDE:
    return x + (magnitude * jax.random.normal(key, x.shape)).astype(x.dtype)
  images = x if x.ndim == 4 else x[..., None]
  keys = jax.random.split(key, len(x))
  one = functools.partial(
    _augment_one, magnitude=magnitude, operations=operations, flip=flip
  )
  return jax.vmap(one)(keys, images).reshape(x.shape).astype(x.dtype)


def _augment_one(
  key: Key,
  image: Array,
  *,
  magnitude: Array | float,
  operations: int,
  flip: bool,
) -> Array:
  """Augment one image, shape=(height, width, channels); see `augment`."""
  names = (*_OPERATIONS, "flip") if flip else _OPERATIONS
  draw = lambda i, n, least: jax.random.uniform(
    jax.random.fold_in(key, i), (n,), minval=least
  )
  priority = draw(0, len(names), 0.0)
  rank = jnp.sum(priority[:, None] > priority[None, :], axis=1)
  drawn = jnp.where(rank < operations, draw(1, len(names), -1.0), 0)
  by = dict(zip(names, magnitude * drawn, strict=True))

  # Where each pixel comes from, counted from the image's centre.
  height, width, _ = image.shape
  middle = (height - 1) / 2, (width - 1) / 2
  y = jnp.arange(height)[:, None] - middle[0]
  x = jnp.arange(width)[None, :] - middle[1]
  if flip:
    x = jnp.where(drawn[-1] > 1 - magnitude, -x, x)
  y, x = y + _SHEAR * by["shear_rows"] * x, x + _SHEAR * by["shear_columns"] * y
  cos, sin = (f(_ANGLE * by["rotate"]) for f in (jnp.cos, jnp.sin))
  y, x = cos * y - sin * x, sin * y + cos * x
  y = y + middle[0] + _SHIFT * height * by["shift_rows"]
  x = x + middle[1] + _SHIFT * width * by["shift_columns"]
  sample = lambda plane: map_coordinates(plane, [y, x], 1, mode="nearest")
  moved = jax.vmap(sample, in_axes=2, out_axes=2)(image)

  # Written so that a factor of 1 is exact.
  low, high, mean = image.min(), image.max(), image.mean()
  blend = lambda a, b, factor: factor * a + (1 - factor) * b
  moved = blend(moved, mean, 1 + _BLEND * by["contrast"])
  moved = blend(moved, low, 1 + _BLEND * by["brightness"])
  moved = jnp.clip(moved, low, high)

  half = _CUT / 2 * jnp.abs(by["cutout"])
  place = draw(2, 2, 0.0)
  inside = lambda n, at: jnp.abs((jnp.arange(n) + 0.5) / n - at) < half
  cut = inside(height, place[0])[:, None] & inside(width, place[1])[None, :]
  return jnp.where(cut[:, :, None], mean, moved)
