"""DRIVE: of every entry of the rotated update its sign, and one scale.

Vargaftik et al. 2021, "DRIVE: One-bit distributed mean estimation" (arXiv
2105.08339). With R x the rotated vector of d entries,

    C(x) = S R^-1 sign(R x)
    S = ||x||^2 / ||R x||_1    unbiased (theorem 2)
    S = ||R x||_1 / d          of the least error (theorem 1)

whose errors are, for every R,

    ||C(x) - x||^2 = (d ||x||^2 / ||R x||_1^2 - 1) ||x||^2
    ||C(x) - x||^2 = (1 - ||R x||_1^2 / (d ||x||^2)) ||x||^2

and for many entries, pi / 2 - 1 = 0.571 and 1 - 2 / pi = 0.363 times ||x||^2.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedjax_sim.core import Array, HParams, Key, Transform, validate
from fedjax_sim.transforms import hadamard
from fedjax_sim.transforms.flattened import compressor, whole_bytes


def drive(
  unbiased: bool = True, block: int | None = hadamard.BLOCK
) -> Transform:
  """Send the signs of the rotated update, and a scale: a bit an entry.

  The theorems are for uniform rotations. With those of `hadamard.py`, as in the
  paper's experiments, `unbiased=True` is nearly so for updates with many
  entries that count, and not for one with two. The whole update is one vector,
  filled up with zeros to whole blocks, each of which is rotated by itself and
  has its own scale; the paper has one block.

  `drive/bytes` is the length of a code that decodes: a float32 a block, and a
  bit for every entry, the zeros that fill it up included. The rotation comes
  from a seed that both ends know.

  Args:
    unbiased: True for the unbiased scale, False for that of the least error,
      which `error_feedback` and `ef21` need.
    block: the longest block, a power of two; None for one block, which may be
      twice as long as the update.

  Raises:
    TypeError, ValueError: an argument of another kind or out of range.
  """
  unbiased = validate.boolean("unbiased", unbiased)
  block = hadamard.checked_block(block)

  def compress(x: Array, hparams: HParams, key: Key) -> tuple[Array, Array]:
    del hparams
    rows = hadamard.rotate(x, key, block)
    length = rows.shape[1]
    taxicab = jnp.sum(jnp.abs(rows), axis=1, keepdims=True)
    if unbiased:
      square = jnp.sum(rows * rows, axis=1, keepdims=True)
      scale = square / jnp.where(taxicab > 0, taxicab, 1)
    else:
      scale = taxicab / length
    signs = jnp.where(rows < 0, -scale, scale)
    count = 4 * len(rows) + whole_bytes(rows.size)
    return hadamard.rotate_back(signs, key, x.size), count

  return compressor("drive", {}, compress)
