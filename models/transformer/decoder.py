"""Decoders: every position sees those before it; GPT-2 and Llama.

Radford et al. 2019, "Language models are unsupervised multitask learners";
Touvron et al. 2023, "LLaMA" (arXiv 2302.13971). A norm goes before each half of
a block, and after the last. Attention's weights are not dropped out, as
`jax.nn.dot_product_attention` has no dropout; all else is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim.models.transformer.attention import Attention
from fedjax_sim.models.transformer.embeddings import (
  STDDEV,
  Embeddings,
  mean_of_tokens,
)
from fedjax_sim.models.transformer.feed_forward import FeedForward
from fedjax_sim.models.transformer.heads import CausalHead, LastTokenHead
from fedjax_sim.models.transformer.remat import applied
from fedjax_sim.models.transformer.sizes import DecoderSizes


def _norm(sizes: DecoderSizes, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
  make = nnx.RMSNorm if sizes.rms_norm else nnx.LayerNorm
  return make(sizes.width, epsilon=sizes.epsilon, rngs=rngs)


class DecoderBlock(nnx.Module):
  """Attention, then feed-forward, each of a norm of what it is added to."""

  def __init__(self, sizes: DecoderSizes, rngs: nnx.Rngs):
    init = nnx.initializers.normal(STDDEV)
    # GPT-2's: the sum over all layers begins as large as a single one.
    output_init = nnx.initializers.normal(STDDEV / (2 * sizes.layers) ** 0.5)
    self.attention_norm = _norm(sizes, rngs)
    self.attention = Attention(
      sizes.width,
      sizes.heads,
      sizes.key_value_heads or sizes.heads,
      sizes.size_of_head,
      bias=sizes.bias,
      causal=True,
      rotary_base=sizes.rotary_base,
      kernel_init=init,
      output_init=output_init,
      rngs=rngs,
    )
    self.feed_forward_norm = _norm(sizes, rngs)
    self.feed_forward = FeedForward(
      sizes.width,
      sizes.feed_forward,
      activation=sizes.activation,
      gated=sizes.gated,
      bias=sizes.bias,
      kernel_init=init,
      output_init=output_init,
      rngs=rngs,
    )
    self.dropout = nnx.Dropout(sizes.dropout, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the block's vectors, (batch, time, width), of x of that shape."""
    x = x + self.dropout(self.attention(self.attention_norm(x)))
    return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Decoder(nnx.Module):
  """Embeddings, blocks, a norm, and logits of the next ids or of classes.

  Padding follows the tokens, so none of them sees it.

  Args:
    sizes: of the model.
    classes: how many there are; None: logits of ids.
    rngs: draws the parameters.
  """

  def __init__(self, sizes: DecoderSizes, classes: int | None, rngs: nnx.Rngs):
    self.sizes = sizes
    learned = sizes.rotary_base is None
    self.embeddings = Embeddings(
      sizes, sizes.max_length if learned else 0, 0, rngs
    )
    self.dropout = nnx.Dropout(sizes.dropout, rngs=rngs)
    self.layers = nnx.List(
      DecoderBlock(sizes, rngs) for _ in range(sizes.layers)
    )
    self.norm = _norm(sizes, rngs)
    self.head = (
      CausalHead(sizes, rngs)
      if classes is None
      else LastTokenHead(sizes, classes, rngs)
    )

  def features(self, ids: jax.Array) -> jax.Array:
    """Return what tells classes, or the mean of all tokens, (batch, width).

    Args:
      ids: shape=(batch, time), integer.
    """
    x, real = self._vectors(ids)
    if isinstance(self.head, CausalHead):
      return mean_of_tokens(x, real)
    return self.head.features(x, real)

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Return logits, (batch, time, vocabulary) or (batch, classes).

    Args:
      ids: shape=(batch, time), integer.
    """
    x, real = self._vectors(ids)
    if isinstance(self.head, CausalHead):
      return self.head(x, self.embeddings.tokens)
    return self.head(x, real)

  def _vectors(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the last norm's vectors, and which are tokens, (batch, time)."""
    ids = ids.astype(jnp.int32)  # an unsigned one is compared with no -1
    x = self.embeddings(ids, jnp.arange(ids.shape[1])[None])
    x = self.dropout(x)
    for layer in self.layers:
      x = applied(layer, self.sizes.remat_blocks, x)
    return self.norm(x), ids != self.sizes.padding_id
