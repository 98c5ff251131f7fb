"""Adaptive clipping, Andrew et al. 2021 (arXiv 1905.03871), without noise."""

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.core import Transform, TransformResult


def adaptive_clipping(quantile, rate=0.2, initial=1.0):
  """Clips to a norm that follows a quantile of the clients' norms."""

  def apply(update, norm, state, hparams, key):
    del hparams, key
    length = optax.tree.norm(update)
    scale = jnp.minimum(1.0, norm / jnp.maximum(length, 1e-30))
    clipped = jax.tree.map(lambda u: scale * u, update)
    below = (length <= norm).astype(jnp.float32)
    return TransformResult(clipped, state, below, {"below": below})

  def update(norm, below, hparams):
    return norm * jnp.exp(-hparams["rate"] * (below - hparams["quantile"]))

  return Transform(
    name="adaptive_clipping",
    hparams={"quantile": quantile, "rate": rate, "initial": initial},
    apply=apply,
    init=lambda params, hparams: hparams["initial"],
    update=update,
  )
