"""A transform that branches in Python on a traced number."""

import jax

from fedjax_sim.core import Transform, TransformResult
from fedjax_sim.core.tree import tree_norm


def shorten(norm: float = 1.0) -> Transform:
  """Clip an update to a norm."""

  def apply(update, shared, state, hparams, key):
    length = tree_norm(update)
    if length > hparams["norm"]:
      scale = hparams["norm"] / length
      update = jax.tree.map(lambda u: scale * u, update)
    return TransformResult(update)

  return Transform(name="shorten", hparams={"norm": norm}, apply=apply)


def direction() -> Transform:
  """Scale an update to length 1; one of zeros becomes NaN."""

  def apply(update, shared, state, hparams, key):
    length = tree_norm(jax.tree.map(lambda u: u[:0], update))
    return TransformResult(jax.tree.map(lambda u: u / length, update))

  return Transform(name="direction", hparams={}, apply=apply)
