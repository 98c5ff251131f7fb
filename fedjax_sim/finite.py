"""Whether numbers are finite, and how to ask it fast."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.base import Array, PyTree


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
  infinity, and of the NaNs above it, to the sign bit.
  """
  int_ = jnp.dtype(f"int{8 * x.dtype.itemsize}")
  most = jnp.iinfo(int_).max
  bits = functools.partial(lax.bitcast_convert_type, new_dtype=int_)
  carry = most - bits(jnp.array(jnp.inf, x.dtype)) + 1
  magnitude = bits(x.ravel()) & most
  return lax.reduce_or(magnitude + carry, (0,)) >= 0


def no_nan(tree: PyTree) -> Array:
  """Whether no number in the tree is NaN; shape=(), bool."""
  nans = [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tree)]
  return ~jnp.any(jnp.array([False, *nans]))
