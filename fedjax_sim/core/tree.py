"""Norms of whole trees, and clipping to them.

In float32 or wider, and so that no square overflows: a tree is first divided by
a power of two near its largest number. That division is a product whose factor
is put together bit by bit: compilers turn x / y into x * (1 / y), and a device
that has no subnormal numbers takes 1 / y for 0 from y = 2^126 on.

What is clipped never exceeds its bound, whatever is rounded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core.algorithm import Array, PyTree

MARGIN = 4e-6  # relative; more than float32 sums are wrong by


def length(tree: PyTree, order: int = 2) -> Array:
  """Return the L1 or L2 norm of all of the tree together.

  Args:
    tree: arrays.
    order: 1 or 2.

  Returns:
    shape=(), float32, or wider as the tree is; infinite if it does not hold it.
  """
  leaves, inverse = scaled(jax.tree.leaves(tree))
  return _reciprocal(inverse) * _length(leaves, order)


def clipped(tree: PyTree, bound: Array | float, order: int = 2) -> PyTree:
  """Return the tree over `bound`, cut to a norm of at most 1, in float32.

  Args:
    tree: arrays. What holds a NaN or an infinity is NaN afterwards.
    bound: shape=(); a tree of zeros stays one even with a bound of 0.
    order: 1 or 2; of the norm.
  """
  near_one, inverse = scaled(tree)
  norm = _length(jax.tree.leaves(near_one), order)
  longest = jnp.maximum(norm, bound * inverse)
  scale = (1 - MARGIN) / jnp.maximum(longest, jnp.finfo(jnp.float32).tiny)
  return jax.tree.map(lambda x: (x * scale).astype(jnp.float32), near_one)


def clipped_by_layer(
  tree: PyTree, bound: Array | float, order: int = 2
) -> PyTree:
  """As `clipped`, but every leaf by itself, to an equal share."""
  leaves, treedef = jax.tree.flatten(tree)
  share = len(leaves) ** -(1.0 / order)
  cut = [clipped(leaf, bound * share, order) * share for leaf in leaves]
  return jax.tree.unflatten(treedef, cut)


def bounded(tree: PyTree, bound: Array | float, order: int = 2) -> PyTree:
  """Return the tree, scaled down if its norm exceeds `bound`.

  Args:
    tree: arrays.
    bound: shape=().
    order: 1 or 2; of the norm.

  Returns:
    float32 or wider: half precision would round beyond the bound. Its norm is
    at most `bound`; that of a tree that is shorter by `MARGIN` is unchanged.
  """
  short = length(tree, order) <= bound * (1 - MARGIN)
  unit = clipped(tree, 0.0, order)
  return jax.tree.map(
    lambda x, u: jnp.where(short, _wide(x), u.astype(_wide(x).dtype) * bound),
    tree,
    unit,
  )


def fits(tree: PyTree, order: int = 2) -> Array:
  """Return whether the norm is at most 1; shape=(), bool; False if NaN.

  Clipping leaves none that is longer: this is a last look at what is released,
  in case that a device computes otherwise than clipping counts on. What
  overflows in a square is longer than 1 anyway, so nothing is scaled.

  Args:
    tree: arrays, float32 or wider.
    order: 1 or 2; of the norm.
  """
  return _length(jax.tree.leaves(tree), order) <= 1


def scaled(tree: PyTree) -> tuple[PyTree, Array]:
  """Return the tree times a power of two, and that power.

  The largest number is below 4 afterwards, and 1 at least unless it was
  subnormal; then all of them may be flushed to 0, as devices do. Squares
  neither overflow nor get lost, and no direction changes.

  Args:
    tree: arrays.

  Returns:
    Leaves of one dtype, float32 or wider; shape=(), of that dtype.
  """
  leaves, treedef = jax.tree.flatten(tree)
  dtype = jnp.result_type(jnp.float32, *leaves)
  leaves = [x.astype(dtype) for x in leaves]
  largest = jnp.zeros((), dtype)
  for x in leaves:
    largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0))
  inverse = _reciprocal(largest)
  return jax.tree.unflatten(treedef, [x * inverse for x in leaves]), inverse


def _length(leaves: list[Array], order: int) -> Array:
  """Return the norm of what no square overflows of."""
  total = jnp.zeros((), jnp.result_type(jnp.float32, *leaves))
  for x in leaves:
    total += jnp.sum(jnp.abs(x) if order == 1 else x * x)
  return total if order == 1 else jnp.sqrt(total)


def _reciprocal(x: Array) -> Array:
  """Return 2^-e for x in [2^e, 2^(e + 1)); normal, exact where x is a power.

  For e above the largest exponent whose reciprocal is a normal number it is
  that number's, for 0 and subnormals that of the smallest normal one.
  """
  info = jnp.finfo(x.dtype)
  int_ = jnp.dtype(f"int{info.bits}")
  shift = int_.type(info.nmant)
  top = int_.type(2**info.nexp - 1)
  exponent = lax.shift_right_logical(lax.bitcast_convert_type(x, int_), shift)
  exponent = jnp.clip(exponent, 1, top - 2)
  bits = lax.shift_left(top - 1 - exponent, shift)
  return lax.bitcast_convert_type(bits, x.dtype)


def _wide(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
