"""Noise on a sum: independent, correlated over rounds, Laplace's, discrete.

All noise is drawn in float32 whatever the leaf, and the noisy sum is float32 at
least, but for `discrete`. Keys come from the caller, a new one every round;
nothing is kept of them. Floating-point noise has gaps that a proof does not
know of: it is for simulations, and hides nothing from somebody who sees the
sum's last bits. Discrete noise on whole numbers has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_sim.core import Array, Key, PyTree
from fedjax_sim.privacy import draws
from fedjax_sim.privacy.central.factorization import Strategy
from fedjax_sim.privacy.secure import discrete_gaussian

MOST_AT_ONCE = 2**20


def init(strategy: Strategy | None, params: PyTree) -> PyTree:
  """Return the state of the noise before the first round.

  Args:
    strategy: what correlates the rounds' noise; None: they are independent,
      and there is no state.
    params: arrays of the sum's shapes.

  Returns:
    float32 leaves, a few times as many numbers as `params` has.
  """
  if strategy is None:
    return ()
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32), params
  )
  if _few(shapes):
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    shapes = jax.ShapeDtypeStruct((size,), jnp.float32)
  return strategy.noising.init_multiply(shapes)


def noised(
  strategy: Strategy | None,
  stddev: Array | float,
  key: Key,
  state: PyTree,
  total: PyTree,
) -> tuple[PyTree, PyTree]:
  """Add Gaussian noise to a round's sum: X + C^-1 Z, row by row.

  The product with C^-1 is computed in a stream (arXiv 2506.08201, section 4.4).

  Args:
    strategy: C; None: the identity.
    stddev: shape=(), of every number of Z, in the sum's unit; may be traced.
    key: of this round.
    state: from `init`, or from the round before.
    total: leaves of any shape, float.

  Returns:
    The noisy sum, in float32 at least, and the state for the next round.
  """
  wide, restored = _at_once(total)
  drawn = _times(stddev, _drawn(draws.normal, draws.normal_apart, key, wide))
  if strategy is not None:
    # In a GPU's TF32 it would not be C's inverse; and the library broadcasts.
    with (
      jax.default_matmul_precision("highest"),
      jax.numpy_rank_promotion("allow"),
    ):
      drawn, state = strategy.noising.multiply_next(drawn, state)
  return restored(jax.tree.map(jnp.add, wide, drawn)), state


def laplace(scale: Array | float, key: Key, total: PyTree) -> PyTree:
  """Add independent Laplace noise to a sum.

  Args:
    scale: shape=(), of every number's noise: its mean absolute value; may be
      traced.
    key: of this round.
    total: leaves of any shape, float.

  Returns:
    The noisy sum, in float32 at least.
  """
  wide, restored = _at_once(total)
  drawn = _times(scale, _drawn(draws.laplace, draws.laplace, key, wide))
  return restored(jax.tree.map(jnp.add, wide, drawn))


def discrete(stddev: float, key: Key, total: PyTree) -> PyTree:
  """Add independent discrete Gaussian noise to a sum, exactly.

  Args:
    stddev: of every number's noise; not traced.
    key: of this round.
    total: leaves of any shape, int32; no noisy sum may exceed that.

  Returns:
    The noisy sum, int32.
  """
  whole, restored = _at_once(total)
  draw = lambda key, shape: discrete_gaussian.sample(key, stddev, shape)
  drawn = _drawn(draw, draw, key, whole)
  return restored(jax.tree.map(jnp.add, whole, drawn))


def _at_once(total: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
  """Return the sum in the form that noise is added to, and the way back.

  If all noise is drawn at once, that form is one vector.
  """

  def wide(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
      return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

  tree = jax.tree.map(wide, total)
  return ravel_pytree(tree) if _few(tree) else (tree, lambda same: same)


def _drawn(
  draw: Callable[[Key, tuple[int, ...]], Array],
  apart: Callable[[Key, tuple[int, ...]], Array],
  key: Key,
  like: PyTree,
) -> PyTree:
  """Return draws of the tree's shapes, each leaf by a key of its own.

  Args:
    draw: (key, shape) -> numbers.
    apart: the same, where a leaf may be in pieces on several devices.
    key: of all of them.
    like: from `_at_once`.
  """
  leaves, treedef = jax.tree.flatten(like)
  how = draw if _few(like) else apart
  each = [
    how(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, each)


def _times(factor: Array | float, tree: PyTree) -> PyTree:
  factor = jnp.asarray(factor, jnp.float32)
  return jax.tree.map(lambda x: factor * x, tree)


def _few(tree: PyTree) -> bool:
  """Return whether all noise is drawn at once.

  Each draw takes a fixed time besides, on a CPU about that of some thousand
  numbers; but large arrays may be dealt over devices, and stay apart.
  """
  sizes = [math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree)]
  return 0 < sum(sizes) <= MOST_AT_ONCE
