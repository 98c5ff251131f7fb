"""The raw update whose contribution to a private sum is longest.

Whoever knows all other contributions and sees c + N(0, s^2 I) in place of
N(0, s^2 I) tells the two apart best by the score <released, c> / |c| (Neyman
and Pearson), which moves by |c| / s deviations; epsilon is a function of that
number alone. So the noise is a constant, the score is given, and the worst case
of a mechanism is the update u that maximizes |c(u)|, where c weighs and clips
as it does for clients. c is differentiable: u is found by gradient ascent, from
the worst of some random and one-layered beginnings, and then tried at lengths
up to the largest float32. With a right clip the gradient is 0, and what is
found is as good as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_sim.core import Array, Key, PyTree

LARGEST = float(jnp.finfo(jnp.float32).max)
SIZES = (30.0, 1.0, 1e4, math.inf)  # in clipping norms, cut to `LARGEST`
CLEARLY = 1e-3
ASCENT = 30.0  # the size at which the direction is sought
STEPS = 30
SQUARED = 1e15  # whose square, of 10^8 coordinates, float32 can sum
BEGINNINGS = 4  # random ones


class Worst(NamedTuple):
  """A raw update, the worst case that was found.

  Attributes:
    direction: leaves of an update's shapes, float32; 1 long together.
    size: shape=(), float32; how long it is, in clipping norms; may be infinite.
    contributes: shape=(), float32; how long its contribution was.
  """

  direction: PyTree
  size: Array
  contributes: Array


def measured(tree: PyTree, order: int) -> Array:
  """Return how long a contribution is, as far as float32 holds it.

  It shares no code with `core.tree`, which it is there to check: nothing is
  divided, and squares are summed only where they cannot overflow.

  Args:
    tree: float arrays.
    order: 1 or 2; of the norm.

  Returns:
    shape=(), float32; the largest coordinate, if that is beyond `SQUARED`;
    infinite, if something is not a number.
  """
  flat = [x.astype(jnp.float32).ravel() for x in jax.tree.leaves(tree)]
  zero = jnp.zeros((), jnp.float32)
  largest, total = zero, zero
  for x in flat:
    largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0))
    total += jnp.sum(jnp.abs(x) ** order)
  short = total if order == 1 else jnp.sqrt(total)
  found = jnp.where(largest <= SQUARED, short, largest)
  return jnp.where(jnp.isnan(found), jnp.inf, found)


def raw(direction: PyTree, length: Array) -> PyTree:
  """Return a direction scaled to a length, cut to what float32 holds."""
  size = jnp.minimum(length, LARGEST)
  return jax.tree.map(lambda d: d * size, direction)


def worst(
  key: Key,
  like: PyTree,
  contribute: Callable[[PyTree], PyTree],
  clip_norm: Array,
  order: int = 2,
) -> Worst:
  """Return the raw update of the longest contribution that is found.

  Args:
    key: of the beginnings.
    like: an update's shapes.
    contribute: raw update -> contribution, as a client's is made.
    clip_norm: shape=().
    order: 1 or 2; of the norm that clipping bounds.
  """

  def at(direction: PyTree, size: Array) -> Array:
    return measured(contribute(raw(direction, size * clip_norm)), order)

  sizes = jnp.array(SIZES, jnp.float32)

  def lengths(direction: PyTree) -> Array:
    return lax.map(lambda size: at(direction, size), sizes)

  count = BEGINNINGS + len(jax.tree.leaves(like))
  begin = _clearly_longest(
    lax.map(
      lambda i: jnp.max(lengths(_beginning(key, i, like))), jnp.arange(count)
    )
  )

  def objective(direction: PyTree) -> Array:
    sent = contribute(raw(direction, ASCENT * clip_norm))
    total = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in _leaves(sent))
    found: Array = jnp.log(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))
    return found

  def ascend(i: Array, direction: PyTree) -> PyTree:
    slope = jax.grad(objective)(direction)
    slope = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), slope)
    rate = 1 / (1 + i.astype(jnp.float32))
    return unit(jax.tree.map(lambda u, g: u + rate * g, direction, unit(slope)))

  first = _beginning(key, begin, like)
  last = lax.fori_loop(0, STEPS, ascend, first)
  both = jax.tree.map(lambda *x: jnp.stack(x), first, last)
  tried = lax.map(lengths, both)
  which, size = jnp.divmod(_clearly_longest(tried.ravel()), len(SIZES))
  direction = jax.tree.map(lambda x: x[which], both)
  return Worst(direction, sizes[size], tried[which, size])


def _clearly_longest(lengths: Array) -> Array:
  """Return the index of the longest; the first, unless another clearly is.

  So with a right clip, where all are as long, every device takes the same.
  """
  return jnp.argmax(jnp.where(lengths > (1 + CLEARLY) * lengths[0], lengths, 0))


def _beginning(key: Key, i: Array, like: PyTree) -> PyTree:
  """Return a direction with all layers as long, or with one layer alone."""
  size = sum(x.size for x in jax.tree.leaves(like))
  signs = jax.random.rademacher(
    jax.random.fold_in(key, i), (size,), jnp.float32
  )
  leaves, treedef = jax.tree.flatten(split(signs, like))
  layers = [
    jnp.where(
      (i < BEGINNINGS) | (i == BEGINNINGS + k), x / math.sqrt(max(x.size, 1)), 0
    )
    for k, x in enumerate(leaves)
  ]
  return unit(jax.tree.unflatten(treedef, layers))


def split(flat: Array, like: PyTree) -> PyTree:
  """Return a vector, of any dtype, as a tree with the shapes of `like`."""
  leaves, treedef = jax.tree.flatten(like)
  ends = np.cumsum([x.size for x in leaves])[:-1]
  parts = jnp.split(flat, ends)
  return jax.tree.unflatten(
    treedef,
    [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)],
  )


def unit(tree: PyTree) -> PyTree:
  """Return the direction of a tree, 1 long; of zeros, zeros."""
  leaves = _leaves(tree)
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves]))
  # Powers of two that make of any float32 one whose inverse is not subnormal.
  power = jnp.where(largest > 2.0**60, 2.0**-66, 1.0)
  power = jnp.where(largest < 2.0**-60, 2.0**66, power)
  scaled = largest * power
  tree = jax.tree.map(
    lambda x: x * power / jnp.where(scaled > 0, scaled, 1), tree
  )
  length = jnp.sqrt(sum(jnp.sum(x**2) for x in _leaves(tree)))
  return jax.tree.map(lambda x: x / jnp.where(length > 0, length, 1), tree)


def _leaves(tree: PyTree) -> list[Array]:
  leaves: list[Array] = jax.tree.leaves(tree)
  return leaves
