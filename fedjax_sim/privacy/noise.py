"""Noise on a sum: independent, correlated over rounds, Laplace's.

All noise is drawn in float32 whatever the leaf, and the noisy sum is float32 at
least. Keys come from the caller, a new one every round; nothing is kept of
them. Floating-point noise has gaps that a proof does not know of: this is for
simulations, and hides nothing from somebody who sees the sum's last bits.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_sim.base import Array, Key, PyTree
from fedjax_sim.privacy import library
from fedjax_sim.privacy.factorization import Strategy

MOST_AT_ONCE = 2**20


def init(strategy: Strategy | None, params: PyTree) -> PyTree:
  """The state of the noise before the first round.

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
  """A round's sum with Gaussian noise: X + C^-1 Z, row by row.

  By `jax_privacy.noise_addition` (arXiv 2506.08201, section 4.4).

  Args:
    strategy: C; None: the identity.
    stddev: shape=(), of every number of Z, in the sum's unit; may be traced.
    key: of this round.
    state: from `init`, or from the round before.
    total: leaves of any shape, float.

  Returns:
    The noisy sum, in float32 at least, and the state for the next round.
  """
  addition = library("jax_privacy.noise_addition")
  make = addition.gaussian_privatizer
  if strategy is not None:
    make = functools.partial(
      addition.matrix_factorization_privatizer, strategy.noising
    )
  privatizer = make(
    stddev=jnp.asarray(stddev, jnp.float32), prng_key=key, dtype=jnp.float32
  )
  # In a GPU's TF32 it would not be C's inverse; and the library broadcasts.
  with (
    jax.default_matmul_precision("highest"),
    jax.numpy_rank_promotion("allow"),
  ):
    wide = _wide(total)
    if not _few(wide):
      noisy, (_, state) = privatizer.update(wide, (key, state))
      return noisy, state
    flat, unflatten = ravel_pytree(wide)
    noisy, (_, state) = privatizer.update(flat, (key, state))
    return unflatten(noisy), state


def laplace(scale: Array | float, key: Key, total: PyTree) -> PyTree:
  """The sum with independent Laplace noise.

  Args:
    scale: shape=(), of every number's noise: its mean absolute value; may be
      traced.
    key: of this round.
    total: leaves of any shape, float.

  Returns:
    The noisy sum, in float32 at least.
  """
  wide = _wide(total)
  if _few(wide):
    flat, unflatten = ravel_pytree(wide)
    draw = jax.random.laplace(key, flat.shape, jnp.float32)
    return unflatten(flat + jnp.asarray(scale, jnp.float32) * draw)
  leaves, treedef = jax.tree.flatten(wide)
  factor = jnp.asarray(scale, jnp.float32)
  noisy = [
    leaf
    + factor
    * jax.random.laplace(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
    for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, noisy)


def _few(tree: PyTree) -> bool:
  """Whether all noise is drawn at once.

  Each draw takes a fixed time besides, on a CPU about that of some thousand
  numbers; but large arrays may be dealt over devices, and stay apart.
  """
  sizes = [math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree)]
  return 0 < sum(sizes) <= MOST_AT_ONCE


def _wide(tree: PyTree) -> PyTree:
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jax.tree.map(wide, tree)
