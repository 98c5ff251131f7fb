"""Top-k: the entries with the largest magnitudes are sent, the others are 0.

Aji & Heafield 2017, "Sparse communication for distributed gradient descent"
(arXiv 1704.05021); Stich et al. 2018, "Sparsified SGD with memory" (arXiv
1809.07599), whose lemma A.1 bounds the error: of n entries k are kept, and

    ||C(x) - x||^2 <= (1 - k / n) ||x||^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  validate,
)
from fedjax_sim.transforms.flattened import (
  flattened,
  total,
  unflattened,
  whole_bytes,
)
from fedjax_sim.transforms.ranks import largest, ordered_bits


def top_k(share: float = 0.01) -> Transform:
  """Keep a share of an update's entries, those of the largest magnitudes.

  Biased; made for `error_feedback` or `ef21`. The whole update is ranked at
  once; of equal magnitudes the first entries are kept.

  `top_k/bytes` is the length of a code that decodes: the kept entries as they
  are, and where they lie, in the shorter of two ways, which k decides and both
  ends know: a bitmap, or the index of each in the fewest bits that hold one.

  Args:
    share: of the entries, in (0, 1]: k is the whole number next to share times
      n, and 1 at least.

  Raises:
    TypeError, ValueError: share is not such a number.
  """
  share = validate.number("share", share, gt=0, le=1)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared, key
    x = flattened(update)
    if not x.size:
      return TransformResult(update, state, bytes=jnp.float32(0))
    count = kept_entries(hparams["share"], x.size)
    kept = largest(ordered_bits(jnp.abs(x)), count)
    sent = unflattened(jnp.where(kept, x, 0), update)
    size = value_bytes(jax.tree.leaves(update), kept) + place_bytes(
      count, x.size
    )
    return TransformResult(sent, state, bytes=size)

  return Transform(name="top_k", hparams={"share": share}, apply=apply)


def kept_entries(share: Array, size: int) -> Array:
  """Return k, the number of entries that are kept; shape=(), int32.

  Args:
    share: shape=(), of the entries.
    size: n, how many there are, > 0.
  """
  near = jnp.round(share * size).astype(jnp.int32)
  return jnp.clip(near, 1, size)


def value_bytes(leaves: Sequence[Array], kept: Array) -> Array:
  """Return what the kept entries take in their own dtypes; shape=(), float32.

  Args:
    leaves: of the update.
    kept: shape=(size,), bool; of the flattened update.
  """
  at, size = 0, jnp.float32(0)
  for x in leaves:
    size += x.dtype.itemsize * total(kept[at : at + x.size])
    at += x.size
  return size


def place_bytes(count: Array, size: int) -> Array:
  """Return what it takes to say which entries are kept; shape=(), float32.

  Args:
    count: shape=(), int32; how many are.
    size: how many there are.
  """
  width = math.ceil(math.log2(size)) if size > 1 else 0
  bits = jnp.minimum(count.astype(jnp.float32) * width, float(size))
  return whole_bytes(bits)
