"""Statistics of clients' updates, and how a stack of updates is joined."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, PyTree
from fedjax_sim.core.tree import length, scaled


def gradient_statistics(update: PyTree) -> dict[str, Array]:
  """What describes a client's pseudo-gradient, the negative of its update.

  With n coordinates g (Dimitriadis et al. 2021, arXiv 2106.07578, weigh clients
  by such numbers):

  - norm: sqrt(sum g^2)
  - mean: sum g / n
  - magnitude: sqrt(sum g^2 / n)
  - variance: sum (g - mean)^2 / n

  Returns:
    name -> shape=(), float32 at least.
  """
  leaves = [
    x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for x in jax.tree.leaves(update)
  ]
  count = sum(x.size for x in leaves)
  mean = -sum(jnp.sum(x) for x in leaves) / count
  norm = length(update)
  spread = sum(jnp.sum((-x - mean.astype(x.dtype)) ** 2) for x in leaves)
  return {
    "norm": norm,
    "mean": mean,
    "magnitude": norm / count**0.5,
    "variance": spread / count,
  }


def cosine(a: PyTree, b: PyTree) -> Array:
  """The cosine of the angle between two updates, NaN if one of them is 0.

  Returns:
    shape=(), float32 at least. No square overflows, or is lost.
  """
  x, y = (jax.tree.leaves(scaled(tree)[0]) for tree in (a, b))
  dot = lambda u, v: sum(jnp.sum(s * t) for s, t in zip(u, v, strict=True))
  lengths = jnp.sqrt(dot(x, x)) * jnp.sqrt(dot(y, y))
  known = lengths > 0
  value = jnp.clip(dot(x, y) / jnp.where(known, lengths, 1), -1, 1)
  return jnp.where(known, value, jnp.nan)


def combine(stack: PyTree, weights: Array) -> PyTree:
  """The weighted mean of stacked updates, 0 if no weight is left.

  Args:
    stack: leaves (slots, ...).
    weights: shape=(slots,), >= 0.

  Returns:
    Leaves (...), in float32 at least.
  """
  total = jnp.sum(weights)
  shares = weights / jnp.where(total > 0, total, 1)

  def join(s: Array) -> Array:
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    return jnp.tensordot(shares.astype(s.dtype), s, axes=1)

  return jax.tree.map(join, stack)
