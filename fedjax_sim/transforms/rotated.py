"""Rotated quantization: a random rotation, then rounding at random.

Suresh et al. 2017, "Distributed mean estimation with limited communication"
(arXiv 1611.00429), section 3: a rotation makes entries alike, so that evenly
spaced levels from the least to the greatest of them are close together. With
R x the rotated update (`hadamard.py`), levels a distance h apart, and p_i the
fractional place of (R x)_i between its two levels,

    E C(x) = x,    E ||C(x) - x||^2 = h^2 sum_i p_i (1 - p_i)    given R
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, HParams, Key, Transform, validate
from fedjax_sim.transforms import hadamard
from fedjax_sim.transforms.flattened import compressor, whole_bytes


def rotated(bits: int = 1, block: int | None = hadamard.BLOCK) -> Transform:
  """Rotate the update, and round at random to 2**bits levels.

  Unbiased. The whole update is one vector, filled up with zeros to whole
  blocks, each of which is rotated by itself and has levels of its own; the
  paper has one block.

  `rotated/bytes` is the length of a code that decodes: of every block two
  float32 numbers, its least and greatest entry, and `bits` for every entry, the
  zeros that fill it up included. The rotation comes from a seed that both ends
  know.

  Args:
    bits: of an entry, 1 to 16.
    block: the longest block, a power of two; None for one block, which may be
      twice as long as the update.

  Raises:
    TypeError, ValueError: an argument of another kind or out of range.
  """
  bits = validate.integer("bits", bits, le=16)
  block = hadamard.checked_block(block)

  def compress(x: Array, hparams: HParams, key: Key) -> tuple[Array, Array]:
    turn, draw = jax.random.split(key)
    rows = hadamard.rotate(x, turn, block)
    low = jnp.min(rows, axis=1, keepdims=True)
    high = jnp.max(rows, axis=1, keepdims=True)
    top = top_level(hparams["bits"]).astype(rows.dtype)
    gap = (high - low) / top
    place = (rows - low) / jnp.where(gap > 0, gap, 1)
    place = jnp.minimum(place, top)
    level = jnp.floor(place)
    level += jax.random.uniform(draw, rows.shape, rows.dtype) < place - level
    decoded = jnp.where(gap > 0, low + gap * level, low)
    count = 8 * len(rows) + whole_bytes(rows.size * hparams["bits"])
    return hadamard.rotate_back(decoded, turn, x.size), count

  return compressor("rotated", {"bits": float(bits)}, compress)


def top_level(bits: Array) -> Array:
  """Return the largest code of so many bits: int32, of the same shape.

  `exp2` is rounded, and would let a code have one bit more.

  Args:
    bits: whole numbers from 1 to 16, of any dtype.
  """
  return (1 << jnp.round(bits).astype(jnp.int32)) - 1
