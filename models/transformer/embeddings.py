"""What a transformer reads: vectors of ids, of positions and of segments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim.models.transformer.sizes import EncoderSizes, Sizes

# Of the embeddings and most kernels, as in BERT, GPT-2 and Llama.
STDDEV = 0.02


def table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
  """Return vectors of `rows` things, shape=(rows, width), small at first."""
  init = nnx.initializers.normal(STDDEV)
  return nnx.Embed(rows, width, embedding_init=init, rngs=rngs)


class Embeddings(nnx.Module):
  """Sums of the vectors of an id, its position and its segment.

  Args:
    sizes: of the model.
    positions: how many positions have vectors; 0: none.
    types: how many segments have vectors; every id is of the first. 0: none.
    rngs: draws the vectors.
  """

  def __init__(self, sizes: Sizes, positions: int, types: int, rngs: nnx.Rngs):
    width = sizes.width
    self.tokens = table(sizes.vocabulary, width, rngs)
    self.positions: nnx.Embed | None = nnx.data(None)
    if positions:
      self.positions = table(positions, width, rngs)
    self.types: nnx.Embed | None = nnx.data(None)
    if types:
      self.types = table(types, width, rngs)

  def __call__(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Return vectors, shape=(batch, time, width).

    Args:
      ids: shape=(batch, time), integer.
      positions: shape=(batch or 1, time), integer.
    """
    x = self.tokens(ids)
    if self.positions is not None:
      x = x + self.positions(positions)
    if self.types is not None:
      x = x + self.types.embedding[0][None, None]
    return x


def mean_of_tokens(x: jax.Array, real: jax.Array) -> jax.Array:
  """Return the mean over the tokens of each text, shape=(batch, width).

  Args:
    x: shape=(batch, time, width).
    real: shape=(batch, time), bool; False for padding.
  """
  weights = real.astype(x.dtype)
  count = jnp.maximum(weights.sum(1), 1)
  return jnp.einsum("bt,btw->bw", weights, x) / count[:, None]


def counted_positions(sizes: EncoderSizes, ids: jax.Array) -> jax.Array:
  """Return the positions of ids, shape=(batch or 1, time)."""
  if sizes.positions_after is None:
    return jnp.arange(ids.shape[1])[None]
  real = (ids != sizes.padding_id).astype(jnp.int32)
  return jnp.cumsum(real, axis=1) * real + sizes.positions_after
