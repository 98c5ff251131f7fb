"""What a transformer says: logits of ids at every position, or of classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim.models.transformer.embeddings import STDDEV
from fedjax_sim.models.transformer.feed_forward import ACTIVATIONS
from fedjax_sim.models.transformer.sizes import Sizes


def _linear(
  n_in: int, n_out: int, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
  init = nnx.initializers.normal(STDDEV)
  return nnx.Linear(n_in, n_out, use_bias=bias, kernel_init=init, rngs=rngs)


class MaskedHead(nnx.Module):
  """Logits of masked ids, as BERT and RoBERTa have them.

  A linear layer, the activation, a norm, and the product with the embedding's
  table, or one of its own, plus a bias.
  """

  def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
    self.dense = _linear(sizes.width, sizes.width, rngs)
    self.activation = ACTIVATIONS[sizes.activation]
    self.norm = nnx.LayerNorm(sizes.width, epsilon=sizes.epsilon, rngs=rngs)
    self.kernel: nnx.Param[jax.Array] | None = nnx.data(None)
    if not sizes.tied:
      init = nnx.initializers.normal(STDDEV)
      self.kernel = nnx.Param(
        init(rngs.params(), (sizes.width, sizes.vocabulary))
      )
    self.bias = nnx.Param(jnp.zeros(sizes.vocabulary))

  def __call__(self, x: jax.Array, tokens: nnx.Embed) -> jax.Array:
    """Return logits, (batch, time, vocabulary), of x, (batch, time, width)."""
    x = self.norm(self.activation(self.dense(x)))
    logits = tokens.attend(x) if self.kernel is None else x @ self.kernel[...]
    return logits + self.bias[...][None, None]


class CausalHead(nnx.Module):
  """Logits of the next ids: with the embedding's table, or a kernel."""

  def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
    self.linear: nnx.Linear | None = nnx.data(None)
    if not sizes.tied:
      self.linear = _linear(sizes.width, sizes.vocabulary, rngs, bias=False)

  def __call__(self, x: jax.Array, tokens: nnx.Embed) -> jax.Array:
    """Return logits, (batch, time, vocabulary), of x, (batch, time, width)."""
    return tokens.attend(x) if self.linear is None else self.linear(x)


class FirstTokenHead(nnx.Module):
  """Logits of classes from the first position, by two linear layers."""

  def __init__(self, sizes: Sizes, classes: int, rngs: nnx.Rngs):
    self.dense = _linear(sizes.width, sizes.width, rngs)
    self.dropout = nnx.Dropout(sizes.dropout, rngs=rngs)
    self.logits = _linear(sizes.width, classes, rngs)

  def features(self, x: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, width)."""
    return self.dropout(jnp.tanh(self.dense(x[:, 0])))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, (batch, classes), of x, (batch, time, width)."""
    return self.logits(self.features(x))


class LastTokenHead(nnx.Module):
  """Logits of classes from the last position that is not padding."""

  def __init__(self, sizes: Sizes, classes: int, rngs: nnx.Rngs):
    self.logits = _linear(sizes.width, classes, rngs, bias=False)

  def features(self, x: jax.Array, real: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, width).

    Args:
      x: shape=(batch, time, width).
      real: shape=(batch, time), bool; False for padding.
    """
    last = jnp.max(real * jnp.arange(real.shape[1])[None], axis=1)
    there = jax.nn.one_hot(last, real.shape[1], dtype=x.dtype)
    return jnp.einsum("bt,btw->bw", there, x)

  def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, classes), of what `features` takes."""
    return self.logits(self.features(x, real))
