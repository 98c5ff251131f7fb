"""signSGD: of every entry its sign, a bit.

Bernstein et al. 2018, "signSGD: Compressed optimisation for non-convex
problems" (arXiv 1802.04434). With the aggregator `majority_vote` the server
takes the sign of the sum of the clients' signs, their majority vote (algorithm
3); with a mean, their mean. Scaled, it is the compressor of EF-signSGD
(Karimireddy et al. 2019, arXiv 1901.09847): of an array x of d entries

    C(x) = ||x||_1 / d sign(x)
    ||C(x) - x||^2 = (1 - ||x||_1^2 / (d ||x||^2)) ||x||^2

and less where entries are 0, which stay so.
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
from fedjax_sim.transforms.flattened import total, whole_bytes


def signsgd(scaling: bool = False) -> Transform:
  """Replace every entry by its sign: -1, 0 or 1.

  Biased: the magnitudes are lost, so `server.learning_rate` alone says how far
  the model moves, in every entry the same. Scaled, the error is that of the
  module's docstring or less, and error feedback works.

  `signsgd/bytes` is the length of a code that decodes, as its length says which
  of the three it is: a bit for every entry, where none is 0; a bitmap that says
  which are, and a bit for every other one; nothing where all are 0. Scaled, a
  float32 an array comes first.

  Args:
    scaling: whether an array's signs are multiplied by its mean magnitude.

  Raises:
    TypeError: scaling is not True or False.
  """
  scaling = validate.boolean("scaling", scaling)

  def one(x: Array) -> Array:
    if not scaling or not x.size:
      return jnp.sign(x)
    near_one, inverse = scaled(x)
    mean = jnp.mean(jnp.abs(near_one)) / inverse
    return (mean * jnp.sign(x)).astype(x.dtype)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared, hparams, key
    leaves = jax.tree.leaves(update)
    size = sum(x.size for x in leaves)
    signs = sum((total(x != 0) for x in leaves), jnp.float32(0))
    bitmap = (signs > 0) & (signs < size)
    count = whole_bytes(signs) + jnp.where(bitmap, whole_bytes(size), 0)
    if scaling:
      count += 4 * sum(x.size > 0 for x in leaves)
    return TransformResult(jax.tree.map(one, update), state, bytes=count)

  return Transform(
    name="signsgd", hparams={}, apply=apply, differentiable=False
  )
