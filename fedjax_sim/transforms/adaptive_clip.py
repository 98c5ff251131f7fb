"""Clipping to a norm that follows a quantile of the clients' norms.

Andrew et al. 2021, "Differentially private learning with adaptive clipping"
(arXiv 1905.03871), algorithm 1, without its noise.
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
from fedjax_sim.core.tree import bounded, tree_norm


def adaptive_clip(
  quantile: float = 0.5, learning_rate: float = 0.2, initial_norm: float = 0.1
) -> Transform:
  """Clip updates to a norm C that the server adapts from round to round.

  A client reports b_i = 1 if the L2 norm of its update is at most C, else 0,
  and the server takes the step

      C <- C exp(-learning_rate (mean of b_i - quantile))

  The mean of b_i is the metric `adaptive_clip/below`.

  This is not private by itself: neither the updates nor the b_i get noise. For
  differential privacy set `privacy.quantile`, which clips in this way, and
  whose noise and epsilon cover the b_i, too.

  Args:
    quantile: gamma, the fraction of the updates that C is to leave as they are,
      in [0, 1].
    learning_rate: eta_C, of the geometric steps, >= 0; 0 keeps C.
    initial_norm: C in the first round, > 0.

  Raises:
    TypeError, ValueError: an argument is no such number.
  """
  quantile = validate.number("quantile", quantile, ge=0.0, le=1.0)
  rate = validate.number("learning_rate", learning_rate, ge=0.0)
  first = validate.number("initial_norm", initial_norm, gt=0.0)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del hparams, key
    clipped = jax.tree.map(
      lambda u, c: c.astype(u.dtype), update, bounded(update, shared)
    )
    below = (tree_norm(update) <= shared).astype(jnp.float32)
    return TransformResult(clipped, state, below, {"below": below})

  def renew(norm: PyTree, below: PyTree, hparams: HParams) -> PyTree:
    gap = below - hparams["quantile"]
    return norm * jnp.exp(-hparams["learning_rate"] * gap).astype(norm.dtype)

  return Transform(
    name="adaptive_clip",
    hparams={
      "quantile": quantile,
      "learning_rate": rate,
      "initial_norm": first,
    },
    apply=apply,
    init=lambda params, hparams: jnp.asarray(
      hparams["initial_norm"], jnp.float32
    ),
    update=renew,
  )
