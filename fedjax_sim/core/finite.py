"""Whether numbers are finite, and how to ask it fast."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core.algorithm import Array, PyTree

_SMALL = 2**16


def all_finite(tree: PyTree) -> Array:
  """Whether every number in the tree is finite; shape=(), bool."""
  finite = jnp.ones((), bool)
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      finite &= all_finite((leaf.real, leaf.imag))
    elif jnp.issubdtype(leaf.dtype, jnp.floating):
      finite &= _finite(leaf)
  return finite


def _finite(x: Array) -> Array:
  """all(isfinite(x)), by which compilers make no vector code for a CPU.

  The bits of |x| are ordered as the numbers are. What is added takes those of
  infinity, and of the NaNs above it, to the sign bit, which is counted: sums
  are what devices that share an array can join. A small array is faster flat;
  a large one may be in pieces, which flattening would put together.
  """
  size = 8 * x.dtype.itemsize
  int_ = jnp.dtype(f"int{size}")
  most = jnp.iinfo(int_).max
  bits = functools.partial(lax.bitcast_convert_type, new_dtype=int_)
  carry = most - bits(jnp.array(jnp.inf, x.dtype)) + 1
  magnitude = bits(x.ravel() if x.size <= _SMALL else x) & most
  sign = lax.shift_right_logical(magnitude + carry, int_.type(size - 1))
  return jnp.sum(sign, dtype=jnp.int32) == 0


def no_nan(tree: PyTree) -> Array:
  """Whether no number in the tree is NaN; shape=(), bool."""
  nans = [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tree)]
  return ~jnp.any(jnp.array([False, *nans]))
