"""Norms of whole trees, and clipping to them.

In float32, and so that no square overflows; what is clipped never exceeds its
bound, whatever is rounded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.base import Array, PyTree

MARGIN = 1e-5  # relative; more than float32 sums are wrong by


def length(tree: PyTree, order: int = 2) -> Array:
  """The L1 or L2 norm of all of the tree together.

  Args:
    tree: arrays.
    order: 1 or 2.

  Returns:
    shape=(), float32, or wider as the tree is.
  """
  leaves = [
    x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for x in jax.tree.leaves(tree)
  ]
  if not leaves:
    return jnp.zeros((), jnp.float32)
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves]))
  unit = jnp.where(largest > 0, largest, 1)
  total = sum(jnp.sum(jnp.abs(x / unit) ** order) for x in leaves)
  norm: Array = unit * (total if order == 1 else jnp.sqrt(total))
  return norm


def clipped(tree: PyTree, bound: Array | float, order: int = 2) -> PyTree:
  """The tree over `bound`, cut to at most 1 long, in float32.

  Args:
    tree: arrays.
    bound: shape=(); a tree of zeros stays one even with a bound of 0.
    order: 1 or 2; of the norm.
  """
  longest = jnp.maximum(length(tree, order), bound)
  scale = (1 - MARGIN) / jnp.maximum(longest, jnp.finfo(jnp.float32).tiny)
  return jax.tree.map(lambda x: (x * scale).astype(jnp.float32), tree)


def clipped_by_layer(
  tree: PyTree, bound: Array | float, order: int = 2
) -> PyTree:
  """As `clipped`, but every leaf by itself, to an equal share."""
  leaves, treedef = jax.tree.flatten(tree)
  share = len(leaves) ** -(1.0 / order)
  cut = [clipped(leaf, bound * share, order) * share for leaf in leaves]
  return jax.tree.unflatten(treedef, cut)
