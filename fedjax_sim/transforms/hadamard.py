"""A randomized Hadamard rotation of an update, block by block.

With H the Walsh-Hadamard matrix of size B, a power of two, and D a diagonal of
random signs, a block x becomes

    R x = H D x / sqrt(B)

which has the norm of x and entries of about the same size. The signs come from
a key that both ends know, so they cost no bytes. H is never written down: its
product takes log2(B) sums and differences of every entry.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, Key

BLOCK = 4096  # what is filled up to whole blocks is at most this much longer


def hadamard(x: Array) -> Array:
  """Return the product of the Walsh-Hadamard matrix and every row.

  The matrix is that of Sylvester: 1 where i and j share an even number of bits,
  else -1. Applied twice, it multiplies by the rows' length.

  Args:
    x: shape=(rows, length), float; the length is a power of two.

  Example:
    hadamard(jnp.ones((1, 4)))  # [[4, 0, 0, 0]]
  """
  rows, length = x.shape
  assert length & (length - 1) == 0
  half = 1
  while half < length:
    pairs = x.reshape(rows, length // (2 * half), 2, half)
    a, b = pairs[:, :, 0], pairs[:, :, 1]
    x = jnp.stack([a + b, a - b], axis=2).reshape(rows, length)
    half *= 2
  return x


def block_size(size: int, block: int | None) -> int:
  """Return the length of blocks: a power of two.

  Args:
    size: of the vector that is cut into blocks.
    block: the longest, a power of two; None for one block.
  """
  whole = 1 << max(size - 1, 0).bit_length()
  return whole if block is None else min(whole, block)


def rotate(x: Array, key: Key, block: int | None) -> Array:
  """Return the rotated blocks of a vector, which zeros fill up.

  Args:
    x: shape=(size,), float.
    key: of the signs.
    block: the longest block, a power of two; None for one block.

  Returns:
    shape=(blocks, block).
  """
  length = block_size(x.size, block)
  rows = jnp.pad(x, (0, -x.size % length)).reshape(-1, length)
  return hadamard(rows * _signs(rows, key)) / math.sqrt(length)


def rotate_back(rows: Array, key: Key, size: int) -> Array:
  """Return the vector that `rotate` was given; shape=(size,).

  Args:
    rows: shape=(blocks, block), float.
    key: that of `rotate`.
    size: of the vector.
  """
  x = hadamard(rows) / math.sqrt(rows.shape[1])
  return (x * _signs(rows, key)).ravel()[:size]


def _signs(rows: Array, key: Key) -> Array:
  return jax.random.rademacher(key, rows.shape, rows.dtype)


def checked_block(block: int | None) -> int | None:
  """Return an option `block` if it is a power of two, or None.

  Raises:
    TypeError, ValueError: it is neither.
  """
  whole = isinstance(block, int) and not isinstance(block, bool)
  if block is None or (whole and block > 0 and block & (block - 1) == 0):
    return block
  if not whole:
    raise TypeError(
      f"block={block!r} is a {type(block).__name__}; give a power of two, or"
      " None for one block."
    )
  raise ValueError(
    f"block={block} is no power of two; give one, such as {BLOCK}, or None for"
    " one block."
  )
