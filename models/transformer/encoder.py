"""Encoders: every position sees all others; BERT and RoBERTa.

Devlin et al. 2019, "BERT" (arXiv 1810.04805); Liu et al. 2019, "RoBERTa" (arXiv
1907.11692). A norm follows each half of a block. Attention's weights are not
dropped out, as `jax.nn.dot_product_attention` has no dropout; all else is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim.models.transformer.attention import Attention
from fedjax_sim.models.transformer.embeddings import (
  STDDEV,
  Embeddings,
  counted_positions,
  mean_of_tokens,
)
from fedjax_sim.models.transformer.feed_forward import FeedForward
from fedjax_sim.models.transformer.heads import FirstTokenHead, MaskedHead
from fedjax_sim.models.transformer.remat import applied
from fedjax_sim.models.transformer.sizes import EncoderSizes


class EncoderBlock(nnx.Module):
  """Attention, then feed-forward, each added to its input and normalized."""

  def __init__(self, sizes: EncoderSizes, rngs: nnx.Rngs):
    init = nnx.initializers.normal(STDDEV)
    norm = lambda: nnx.LayerNorm(sizes.width, epsilon=sizes.epsilon, rngs=rngs)
    self.attention = Attention(
      sizes.width,
      sizes.heads,
      sizes.key_value_heads or sizes.heads,
      sizes.size_of_head,
      bias=True,
      causal=False,
      rotary_base=None,
      kernel_init=init,
      output_init=init,
      rngs=rngs,
    )
    self.attention_norm = norm()
    self.feed_forward = FeedForward(
      sizes.width,
      sizes.feed_forward,
      activation=sizes.activation,
      gated=False,
      bias=True,
      kernel_init=init,
      output_init=init,
      rngs=rngs,
    )
    self.feed_forward_norm = norm()
    self.dropout = nnx.Dropout(sizes.dropout, rngs=rngs)

  def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
    """Return the block's vectors, shape=(batch, time, width).

    Args:
      x: shape=(batch, time, width).
      real: shape=(batch, time), bool; False for padding.
    """
    attended = self.dropout(self.attention(x, real))
    x = self.attention_norm(x + attended)
    return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Encoder(nnx.Module):
  """Embeddings, blocks, and logits of masked ids or of classes.

  Args:
    sizes: of the model.
    classes: how many there are; None: logits of ids.
    rngs: draws the parameters.
  """

  def __init__(self, sizes: EncoderSizes, classes: int | None, rngs: nnx.Rngs):
    self.sizes = sizes
    after = sizes.positions_after
    first = 0 if after is None else after + 1
    self.embeddings = Embeddings(
      sizes, first + sizes.max_length, sizes.types, rngs
    )
    self.embeddings_norm = nnx.LayerNorm(
      sizes.width, epsilon=sizes.epsilon, rngs=rngs
    )
    self.dropout = nnx.Dropout(sizes.dropout, rngs=rngs)
    self.layers = nnx.List(
      EncoderBlock(sizes, rngs) for _ in range(sizes.layers)
    )
    self.head = (
      MaskedHead(sizes, rngs)
      if classes is None
      else FirstTokenHead(sizes, classes, rngs)
    )

  def features(self, ids: jax.Array) -> jax.Array:
    """Return what tells classes, or the mean of all tokens, (batch, width).

    Args:
      ids: shape=(batch, time), integer.
    """
    x, real = self._vectors(ids)
    if isinstance(self.head, MaskedHead):
      return mean_of_tokens(x, real)
    return self.head.features(x)

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Return logits, (batch, time, vocabulary) or (batch, classes).

    Args:
      ids: shape=(batch, time), integer.
    """
    x, _ = self._vectors(ids)
    if isinstance(self.head, MaskedHead):
      return self.head(x, self.embeddings.tokens)
    return self.head(x)

  def _vectors(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the last block's vectors, and which are tokens, (batch, time)."""
    ids = ids.astype(jnp.int32)  # an unsigned one is compared with no -1
    real = ids != self.sizes.padding_id
    x = self.embeddings(ids, counted_positions(self.sizes, ids))
    x = self.dropout(self.embeddings_norm(x))
    for layer in self.layers:
      x = applied(layer, self.sizes.remat_blocks, x, real)
    return x, real
