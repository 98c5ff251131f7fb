"""Random-k: entries that a seed chooses are sent, the others are 0.

Stich et al. 2018, "Sparsified SGD with memory" (arXiv 1809.07599), and, in its
unbiased form, Wangni et al. 2018, "Gradient sparsification for
communication-efficient distributed optimization" (arXiv 1710.09854). Of n
entries each is kept with probability k / n, and

    E ||C(x) - x||^2 = (1 - k / n) ||x||^2    as they are
    E C(x) = x,  E ||C(x) - x||^2 = (n / k - 1) ||x||^2    times n / k
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  validate,
)
from fedjax_sim.transforms.flattened import flattened, unflattened
from fedjax_sim.transforms.ranks import largest
from fedjax_sim.transforms.top_k import kept_entries, value_bytes


def random_k(share: float = 0.01, unbiased: bool = True) -> Transform:
  """Keep a share of an update's entries, drawn anew for each client and round.

  `random_k/bytes` is the length of a code that decodes: the kept entries as
  they are. Which they are costs nothing, as client and server draw them from a
  seed that both know.

  Args:
    share: of the entries, in (0, 1]: k is the whole number next to share times
      n, and 1 at least.
    unbiased: whether the kept entries are multiplied by n / k. With
      `error_feedback` or `ef21` set it to False: these need an error that is
      less than the update.

  Raises:
    TypeError, ValueError: an argument of another kind or out of range.
  """
  share = validate.number("share", share, gt=0, le=1)
  unbiased = validate.boolean("unbiased", unbiased)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared
    x = flattened(update)
    if not x.size:
      return TransformResult(update, state, bytes=jnp.float32(0))
    count = kept_entries(hparams["share"], x.size)
    drawn = jax.random.bits(key, x.shape, jnp.uint32) >> 1
    kept = largest(drawn.astype(jnp.int32), count)
    factor = x.size / count.astype(x.dtype) if unbiased else 1
    sent = unflattened(jnp.where(kept, factor * x, 0), update)
    size = value_bytes(jax.tree.leaves(update), kept)
    return TransformResult(sent, state, bytes=size)

  return Transform(name="random_k", hparams={"share": share}, apply=apply)
