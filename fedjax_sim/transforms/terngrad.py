"""TernGrad: every entry is -s, 0 or s, with s its array's largest magnitude.

Wen et al. 2017, "TernGrad: Ternary gradients to reduce communication in
distributed deep learning" (arXiv 1705.07878), with a scale per layer (section
3.2) and, if asked for, gradient clipping (section 3.3):

    T(g)_i = s sgn(g_i) b_i,    P(b_i = 1) = |g_i| / s

So E T(g) = g, and E ||T(g) - g||^2 = sum_i |g_i| (s - |g_i|).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  validate,
)
from fedjax_sim.core.tree import MARGIN, scaled
from fedjax_sim.transforms.flattened import whole_bytes


def terngrad(clip: float | None = None) -> Transform:
  """Replace every entry by 0 or, with its sign, its array's largest magnitude.

  Unbiased without `clip`; with it, of the clipped update.

  `terngrad/bytes` is the length of a code that decodes: a float32 an array, and
  the signs -1, 0 and 1 of all entries, five to a byte (3^5 = 243 <= 256).

  Args:
    clip: first bounds the magnitudes of an array by so many standard deviations
      of its entries, > 0; the paper's experiments take 2.5. An array whose
      entries are all equal stays. None: all do.

  Raises:
    TypeError, ValueError: clip is not such a number.
  """
  if clip is not None:
    clip = validate.number("clip", clip, gt=0)

  def one(x: Array, hparams: HParams, key: Key) -> Array:
    if not x.size:
      return x
    wide, inverse = scaled(x)
    if clip is not None:
      deviation = jnp.std(wide)
      bound = hparams["clip"].astype(wide.dtype) * deviation
      # Equal entries deviate by 0, but for rounding, and would vanish.
      alike = deviation <= MARGIN * jnp.max(jnp.abs(wide))
      bound = jnp.where(alike, jnp.inf, bound)
      wide = jnp.clip(wide, -bound, bound)
    magnitude = jnp.abs(wide)
    scale = jnp.max(magnitude)
    chance = magnitude / jnp.where(scale > 0, scale, 1)
    drawn = jax.random.uniform(key, x.shape, wide.dtype) < chance
    ternary = scale * (jnp.sign(wide) * drawn)
    return (ternary / inverse).astype(x.dtype)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared
    leaves, treedef = jax.tree.flatten(update)
    sent = [
      one(x, hparams, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)
    ]
    size = sum(x.size for x in leaves)
    count = 4 * sum(x.size > 0 for x in leaves) + whole_bytes(8 * -(-size // 5))
    return TransformResult(
      jax.tree.unflatten(treedef, sent), state, bytes=count
    )

  return Transform(
    name="terngrad",
    hparams={} if clip is None else {"clip": clip},
    apply=apply,
    differentiable=False,
  )
