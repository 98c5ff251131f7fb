"""Math on whole trees: norms, clipping, finiteness, weighted sums.

Norms are computed in float32 or wider, without overflow of squares: a tree is
first divided by a power of two near its largest number. The division is a
multiplication by a factor assembled from bits, because compilers turn x / y
into x * (1 / y), and devices without subnormal numbers flush 1 / y to 0 for
y >= 2^126.

A clipped tree never exceeds its bound, however results are rounded.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core.types import Array, PyTree

MARGIN = 4e-6  # relative; more than float32 sums are wrong by


def tree_norm(tree: PyTree, order: int = 2) -> Array:
  """Return the L1 or L2 norm of the whole tree.

  Args:
    tree: arrays.
    order: 1 or 2.

  Returns:
    shape=(), float32 or the tree's dtype if wider; infinite if out of range.
  """
  leaves, inverse = scaled(jax.tree.leaves(tree))
  return inverse_power(inverse) * _length(leaves, order)


def clip_to_unit_norm(
  tree: PyTree, bound: Array | float, order: int = 2
) -> PyTree:
  """Return the tree divided by `bound`, clipped to norm 1, in float32.

  Args:
    tree: arrays. The result is NaN if any number is NaN or infinite.
    bound: shape=(); a tree of zeros stays zero even for a bound of 0.
    order: order of the norm, 1 or 2.
  """
  near_one, inverse = scaled(tree)
  norm = _length(jax.tree.leaves(near_one), order)
  longest = jnp.maximum(norm, bound * inverse)
  scale = (1 - MARGIN) / jnp.maximum(longest, jnp.finfo(jnp.float32).tiny)
  return jax.tree.map(lambda x: (x * scale).astype(jnp.float32), near_one)


def clipped_by_layer(
  tree: PyTree, bound: Array | float, order: int = 2
) -> PyTree:
  """Return the tree with every leaf clipped to an equal share of the norm.

  The leaves are clipped as by `clip_to_unit_norm`. The whole tree then has a
  norm of at most 1.
  """
  leaves, treedef = jax.tree.flatten(tree)
  share = len(leaves) ** -(1.0 / order)
  cut = [
    clip_to_unit_norm(leaf, bound * share, order) * share for leaf in leaves
  ]
  return jax.tree.unflatten(treedef, cut)


def bounded(tree: PyTree, bound: Array | float, order: int = 2) -> PyTree:
  """Return the tree, scaled down if its norm exceeds `bound`.

  Args:
    tree: arrays.
    bound: shape=().
    order: order of the norm, 1 or 2.

  Returns:
    Leaves in float32 or wider, as half precision would round beyond the bound.
    The norm is at most `bound`. A tree whose norm is below it by a relative
    `MARGIN` is unchanged.
  """
  short = tree_norm(tree, order) <= bound * (1 - MARGIN)
  unit = clip_to_unit_norm(tree, 0.0, order)
  return jax.tree.map(
    lambda x, u: jnp.where(short, _wide(x), u.astype(_wide(x).dtype) * bound),
    tree,
    unit,
  )


def fits(tree: PyTree, order: int = 2) -> Array:
  """Return whether the norm is at most 1; shape=(), bool; False if NaN.

  Clipped trees always fit. This is a last check of what is released, for
  devices whose arithmetic breaks the assumptions of clipping. Nothing is scaled
  first: a norm whose square overflows exceeds 1 anyway.

  Args:
    tree: arrays, float32 or wider.
    order: order of the norm, 1 or 2.
  """
  return _length(jax.tree.leaves(tree), order) <= 1


def scaled(tree: PyTree) -> tuple[PyTree, Array]:
  """Return the tree times a power of two, and that power.

  The largest number is then in [1, 4), unless it was subnormal; devices may
  flush such a tree to 0. Squares neither overflow nor vanish, and the direction
  is unchanged.

  Args:
    tree: arrays.

  Returns:
    Leaves of one dtype, float32 or wider; shape=(), of that dtype.
  """
  leaves, treedef = jax.tree.flatten(tree)
  dtype = jnp.result_type(jnp.float32, *leaves)
  # XLA would square a constant leaf, such as the zeros of a parameter without a
  # gradient, and the power of two apart from it, which overflows.
  leaves = [x.astype(dtype) for x in lax.optimization_barrier(leaves)]
  largest = jnp.zeros((), dtype)
  for x in leaves:
    largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0))
  inverse = inverse_power(largest)
  return jax.tree.unflatten(treedef, [x * inverse for x in leaves]), inverse


def _length(leaves: list[Array], order: int) -> Array:
  """Return the norm of leaves whose squares do not overflow."""
  total = jnp.zeros((), jnp.result_type(jnp.float32, *leaves))
  for x in leaves:
    total += jnp.sum(jnp.abs(x) if order == 1 else x * x)
  return total if order == 1 else jnp.sqrt(total)


def inverse_power(x: Array) -> Array:
  """Return 2^-e for each x in [2^e, 2^(e + 1)), a normal number.

  e is limited to exponents whose reciprocal is normal; 0 and subnormal numbers
  count as the smallest normal one.
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


MOST_COLUMNS = 32  # of narrow matrices


def is_narrow(x: Any) -> bool:
  """Return whether an array is a float32 matrix of few columns.

  Its rows are short for a CPU's vectors; see `engine/layouts.py`.

  Args:
    x: an array, or its shape and dtype.
  """
  if len(x.shape) != 2 or x.dtype != jnp.float32:
    return False
  rows, columns = x.shape
  return bool(columns <= MOST_COLUMNS and rows >= 2 * columns)


_SMALL = 2**16


def all_finite(tree: PyTree) -> Array:
  """Return whether every number in the tree is finite; shape=(), bool."""
  finite = jnp.ones((), bool)
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      finite &= all_finite((leaf.real, leaf.imag))
    elif jnp.issubdtype(leaf.dtype, jnp.floating):
      finite &= _finite(leaf)
  return finite


def _finite(x: Array) -> Array:
  """Return all(isfinite(x)), in a form that XLA vectorizes on CPUs.

  The bits of |x| are ordered like the numbers. Adding `carry` moves infinity,
  and the NaNs above it, into the sign bit, and the sign bits are summed: unlike
  a logical and, a sum is reduced over devices that share an array. Small arrays
  are faster flat; large ones may be sharded, and flattening would gather them.
  """
  size = 8 * x.dtype.itemsize
  int_ = jnp.dtype(f"int{size}")
  most = jnp.iinfo(int_).max
  bits = functools.partial(lax.bitcast_convert_type, new_dtype=int_)
  carry = most - bits(jnp.array(jnp.inf, x.dtype)) + 1
  x = x.T if is_narrow(x) else x  # as they lie where clients train
  magnitude = bits(x.ravel() if x.size <= _SMALL else x) & most
  sign = lax.shift_right_logical(magnitude + carry, int_.type(size - 1))
  if sign.ndim == 1 and jax.default_backend() == "cpu":
    sign = _partly_summed(sign)
  return jnp.sum(sign, dtype=jnp.int32) == 0


def _partly_summed(x: Array) -> Array:
  """Return a shorter vector of the same sum, where its length can be divided.

  XLA for CPUs writes a vector of more than 32 numbers out before it sums it,
  and would make one sum of these without barriers.
  """
  part = next((n for n in range(32, 7, -1) if x.size % n == 0), x.size)
  if x.size <= part:
    return x
  parts = jnp.sum(x.reshape(-1, part), axis=1, dtype=jnp.int32)
  return _partly_summed(lax.optimization_barrier(parts))


def no_nan(tree: PyTree) -> Array:
  """Return whether no number in the tree is NaN; shape=(), bool."""
  nans = [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tree)]
  return ~jnp.any(jnp.array([False, *nans]))


def in_float32(tree: PyTree) -> PyTree:
  """Return the arrays in float32 or wider, for sums.

  float16 ends at 65,504, bfloat16 has 8 bits, and int32 wraps around.
  """
  wide = lambda x: jnp.promote_types(jnp.result_type(x), jnp.float32)
  return jax.tree.map(lambda x: jnp.asarray(x, wide(x)), tree)


def accumulator_dtype(x: Array) -> Any:
  """Return the dtype of a sum of such numbers."""
  return jnp.promote_types(x.dtype, jnp.float32)


def in_dtype(x: Array, dtype: Any) -> Array:
  """Return a mean in the dtype of what it is a mean of.

  Integers, such as a layer's count of steps, are the nearest: what is equal at
  all clients stays as it is, although the mean has rounding errors.

  Example:
    >>> int(in_dtype(jnp.float32(2.9999998), jnp.int32))
    3

  Args:
    x: numbers.
    dtype: what they become.
  """
  whole = jnp.issubdtype(dtype, jnp.integer)
  return (jnp.round(x) if whole else x).astype(dtype)


def zeros_accumulator(update: PyTree) -> PyTree:
  """Return zeros of the update's shapes, in float32 or wider."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, accumulator_dtype(x)), update
  )


def exact_accumulator(update: PyTree) -> PyTree:
  """Return zeros for a sum in which integers stay integers, int32 or wider."""

  def zeros(x: Array) -> Array:
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    dtype = jnp.promote_types(x.dtype, jnp.int32 if whole else jnp.float32)
    return jnp.zeros(x.shape, dtype)

  return jax.tree.map(zeros, update)


def add_weighted(
  acc: PyTree, updates: PyTree, weights: Array, present: Array
) -> PyTree:
  """Return `acc` plus the sum of `weight * update` over the present lanes.

  Args:
    acc: accumulator, as `zeros_accumulator` returns it.
    updates: leaves (lanes, ...); absent lanes may hold anything, even NaN.
    weights: shape=(lanes,), float.
    present: shape=(lanes,), bool; lanes that are absent add exactly 0.
  """

  def add(a: Array, u: Array) -> Array:
    shape = (-1,) + (1,) * (u.ndim - 1)
    u = u.astype(a.dtype) * weights.reshape(shape).astype(a.dtype)
    here = jnp.where(present.reshape(shape), u, 0)
    return a + jnp.sum(here, axis=0, dtype=a.dtype)

  return jax.tree.map(add, acc, updates)


def divide(acc: PyTree, count: Array) -> PyTree:
  """Return `acc / count`, or 0 where count is 0."""
  safe = jnp.where(count > 0, count, 1)
  return jax.tree.map(lambda a: a / safe.astype(a.dtype), acc)


def tree_where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
  """Return `new` if the condition holds, else `old`; leaf by leaf.

  An array that is the same object in both is returned as that object.

  Args:
    condition: shape=(), bool.
    new: arrays.
    old: arrays of the same structure.
  """

  def choice(new: Array, old: Array) -> Array:
    same = new is old and isinstance(new, jax.Array)
    return new if same else jnp.where(condition, new, old)

  return jax.tree.map(choice, new, old)


def nbytes(tree: PyTree) -> int:
  """Return the number of bytes of all arrays, or shapes, in the tree."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def paths_of(tree: PyTree) -> list[str]:
  """Return the path of every leaf, such as `layers/0/kernel`, in order."""

  def named(path: tuple[Any, ...]) -> str:
    # A Flax variable is a node, whose one leaf is its value.
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
      path = path[:-1] if path[-1].name == "value" else path
    return jax.tree_util.keystr(path, simple=True, separator="/")

  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [named(path) for path, _ in leaves]
