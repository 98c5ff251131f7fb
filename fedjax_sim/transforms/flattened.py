"""A whole update as one vector, and counts of what a code takes.

Compressors of a vector see an update's arrays one after the other, in the order
of `jax.tree.leaves`, row after row.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
)
from fedjax_sim.core.tree import scaled

_ROW = 2**16  # of sums: 2^15 - 1 bits each still fit an int32


def flattened(update: PyTree) -> Array:
  """Return all entries of an update; shape=(size,), float32 or wider.

  Args:
    update: arrays of floats, some of which may be empty.
  """
  leaves = jax.tree.leaves(update)
  dtype = jnp.result_type(jnp.float32, *leaves)
  parts = [jnp.ravel(x).astype(dtype) for x in leaves]
  return jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)


def unflattened(vector: Array, update: PyTree) -> PyTree:
  """Return a vector's entries as arrays of an update's shapes and dtypes.

  Args:
    vector: shape=(size,), as `flattened` orders it.
    update: whose structure the result has.
  """
  leaves, treedef = jax.tree.flatten(update)
  parts, at = [], 0
  for x in leaves:
    part = vector[at : at + x.size]
    parts.append(part.reshape(x.shape).astype(x.dtype))
    at += x.size
  return jax.tree.unflatten(treedef, parts)


def total(counts: Array) -> Array:
  """Return the sum of whole numbers; shape=(), float32.

  Exact up to 2^24, and right to a few parts in 10^7 beyond, where an int32
  would wrap around and a float32 that grows by ones would stand still.

  Args:
    counts: any shape, each from 0 to 2^15 - 1.
  """
  flat = jnp.ravel(counts).astype(jnp.int32)
  rows = jnp.pad(flat, (0, -flat.size % _ROW)).reshape(-1, _ROW)
  return jnp.sum(jnp.sum(rows, axis=1, dtype=jnp.int32).astype(jnp.float32))


def whole_bytes(bits: Array | float) -> Array:
  """Return the bytes that hold so many bits; shape=(), float32."""
  return jnp.ceil(jnp.asarray(bits, jnp.float32) / 8)


def compressor(
  name: str,
  hparams: HParams,
  compress: Callable[[Array, HParams, Key], tuple[Array, Array]],
) -> Transform:
  """Return the transform that compresses the whole update as one vector.

  Args:
    name: of the transform.
    hparams: its numeric hyper-parameters.
    compress: (vector, hparams, key) -> (vector as it is decoded, its bytes).
      The vector has shape=(size,), size > 0, and is divided by a power of two
      near its largest entry, so that squares and sums do not overflow.
  """

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared
    vector, inverse = scaled(flattened(update))
    if not vector.size:
      return TransformResult(update, state, bytes=jnp.float32(0))
    decoded, count = compress(vector, hparams, key)
    sent = unflattened(decoded / inverse, update)
    return TransformResult(sent, state, bytes=count)

  return Transform(
    name=name, hparams=hparams, apply=apply, differentiable=False
  )
