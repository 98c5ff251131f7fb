"""signSGD: of every entry its sign, one bit.

Bernstein et al. 2018, "signSGD: Compressed optimisation for non-convex
problems" (arXiv 1802.04434). With the aggregator `majority_vote` the server
takes the sign of the sum of the clients' signs, their majority vote (algorithm
3); with a mean, their mean. Scaled, it is the compressor of EF-signSGD
(Karimireddy et al. 2019, arXiv 1901.09847): of an array x of d entries

    C(x) = ||x||_1 / d sign(x)
    ||C(x) - x||^2 = (1 - ||x||_1^2 / (d ||x||^2)) ||x||^2
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
from fedjax_sim.core.tree import scaled
from fedjax_sim.transforms.flattened import whole_bytes


def signsgd(scaling: bool = False) -> Transform:
  """Replace every entry by its sign, -1 or 1; of 0 by one that a coin chooses.

  Biased: the magnitudes are lost, so `server.learning_rate` alone says how far
  the model moves, in every entry the same. Scaled, the error is that of the
  module's docstring, less than the update itself, and error feedback works.

  `signsgd/bytes` is the length of a code that decodes: a bit an entry, and,
  scaled, a float32 an array.

  Args:
    scaling: whether an array's signs are multiplied by its mean magnitude.

  Raises:
    TypeError: scaling is not True or False.
  """
  scaling = validate.boolean("scaling", scaling)

  def one(x: Array, key: Key) -> Array:
    if not x.size:
      return x
    coin = jax.random.rademacher(key, x.shape, x.dtype)
    sign = jnp.where(x == 0, coin, jnp.sign(x))
    if not scaling:
      return sign
    near_one, inverse = scaled(x)
    mean = jnp.mean(jnp.abs(near_one)) / inverse
    return (mean * sign).astype(x.dtype)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared, hparams
    leaves, treedef = jax.tree.flatten(update)
    sent = [one(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
    scales = 4 * sum(x.size > 0 for x in leaves) if scaling else 0
    count = scales + whole_bytes(sum(x.size for x in leaves))
    return TransformResult(
      jax.tree.unflatten(treedef, sent), state, bytes=count
    )

  return Transform(
    name="signsgd", hparams={}, apply=apply, differentiable=False
  )
