"""EDEN: entries of the rotated update, rounded as those of a normal one are.

Vargaftik et al. 2022, "EDEN: Communication-efficient and robust distributed
mean estimation for federated learning" (arXiv 2108.08842). With R x the rotated
vector of d entries, and Q the nearest of the 2^b levels that Lloyd and Max
found for the standard normal distribution,

    q = Q(sqrt(d) / ||x|| R x)
    C(x) = S R^-1 q,    S = ||x||^2 / <R x, q>
    ||C(x) - x||^2 = (||x||^2 ||q||^2 / <R x, q>^2 - 1) ||x||^2    for every R

which is unbiased for uniform rotations (theorem 2.1). With one bit it is DRIVE.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import Array, HParams, Key, Transform, validate
from fedjax_sim.transforms import hadamard
from fedjax_sim.transforms.flattened import compressor, whole_bytes


def eden(bits: int = 1, block: int | None = hadamard.BLOCK) -> Transform:
  """Rotate the update, and round entries to the normal's 2**bits best levels.

  The theorem is for uniform rotations. With those of `hadamard.py`, as in the
  paper's experiments, it is nearly unbiased for updates with many entries that
  count, and not for one with two. The whole update is one vector, filled up
  with zeros to whole blocks, each of which is rotated by itself and has its own
  scale; the paper has one block.

  `eden/bytes` is the length of a code that decodes: a float32 a block, and
  `bits` for every entry, the zeros that fill it up included. The rotation comes
  from a seed that both ends know.

  Args:
    bits: of an entry, 1 to 8; no hyper-parameter, as the levels are compiled
      in.
    block: the longest block, a power of two; None for one block, which may be
      twice as long as the update.

  Raises:
    TypeError, ValueError: an argument of another kind or out of range.
  """
  bits = validate.integer("bits", bits, le=8)
  block = hadamard.checked_block(block)
  levels = normal_levels(bits)
  bounds = (levels[1:] + levels[:-1]) / 2

  def compress(x: Array, hparams: HParams, key: Key) -> tuple[Array, Array]:
    del hparams
    rows = hadamard.rotate(x, key, block)
    length = rows.shape[1]
    square = jnp.sum(rows * rows, axis=1, keepdims=True)
    near_normal = rows * jnp.sqrt(length / jnp.where(square > 0, square, 1))
    code = jnp.searchsorted(
      jnp.asarray(bounds, rows.dtype), near_normal.ravel(), side="right"
    )
    q = jnp.asarray(levels, rows.dtype)[code].reshape(rows.shape)
    product = jnp.sum(rows * q, axis=1, keepdims=True)
    scale = square / jnp.where(product > 0, product, 1)
    count = 4 * len(rows) + whole_bytes(rows.size * bits)
    return hadamard.rotate_back(scale * q, key, x.size), count

  return compressor("eden", {}, compress)


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
  """Return the levels of the least mean squared error for a normal number.

  Max 1960, "Quantizing for minimum distortion", by Lloyd's iteration: every
  level is the mean of the numbers that are nearest to it.

  Args:
    bits: of a code.

  Returns:
    shape=(2**bits,), float64, ascending.

  Example:
    normal_levels(1)  # [-0.798, 0.798]: sqrt(2 / pi)
  """
  from scipy import stats  # as long to import as JAX: only where it is needed

  norm = stats.norm
  count = 2**bits
  # Of many levels the best are spaced as those of a normal with variance 3.
  levels = norm.ppf((np.arange(count) + 0.5) / count, scale=3**0.5)
  for _ in range(2000):
    bounds = np.concatenate(
      [[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]]
    )
    new = -np.diff(norm.pdf(bounds)) / np.diff(norm.cdf(bounds))
    moved = np.max(np.abs(new - levels))
    levels = new
    if moved < 1e-8:  # float32 has no more
      break
  levels.flags.writeable = False
  return levels
