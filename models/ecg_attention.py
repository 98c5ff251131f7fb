"""A network for heartbeats: convolutions, an LSTM, attention.

The network that many use on Kaggle's heartbeats, and FLUTE with them. Two
blocks of convolutions with batch normalization; an LSTM that reads the channels
one after the other, each of which is a short signal; and two sums of its
outputs, weighted by what its last output and its last cell ask for. It begins
with PyTorch's default draws.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import (
  LSTM,
  batch_norm,
  conv,
  linear,
  max_pool,
  uniform,
)
from fedjax_sim.tasks import nnx_task

WINDOW = 5  # of the convolutions
SHORTEST = 10  # that leaves one step after both blocks


class Block(nnx.Module):
  """Three convolutions with a sum around the latter two, and max pooling."""

  def __init__(self, features_in: int, features: int, *, rngs: nnx.Rngs):
    def layer(features_in: int) -> nnx.Conv:
      draw = uniform(WINDOW * features_in)
      return conv(
        features_in,
        features,
        (WINDOW,),
        padding="VALID",
        kernel_init=draw,
        bias_init=draw,
        rngs=rngs,
      )

    self.conv1, self.norm1 = layer(features_in), batch_norm(features, rngs=rngs)
    self.conv2, self.norm2 = layer(features), batch_norm(features, rngs=rngs)
    self.conv3, self.norm3 = layer(features), batch_norm(features, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return (batch, time // 2, features) of x, (batch, time, features_in)."""

    def opened(x: jax.Array) -> jax.Array:
      past = [(0, 0), (WINDOW - 1, 0), (0, 0)]  # the next convolution's length
      return jnp.pad(nnx.swish(x), past)

    first = self.conv1(x)
    x = self.conv2(opened(self.norm1(first)))
    x = self.conv3(opened(self.norm2(x)))
    return max_pool(opened(self.norm3(first + x)))


class EcgAttention(nnx.Module):
  """Two blocks, an LSTM over channels, attention, classes."""

  def __init__(
    self,
    length: int,
    channels: int,
    classes: int,
    width: int,
    double_softmax: bool,
    *,
    rngs: nnx.Rngs,
  ):
    self.double_softmax = double_softmax
    self.block1 = Block(channels, width, rngs=rngs)
    self.block2 = Block(width, width, rngs=rngs)
    self.lstm = LSTM(
      length // 2 // 2,
      width,
      recurrent_bias=True,
      uniform_init=True,
      rngs=rngs,
    )
    self.attention = linear(width, width, use_bias=False, rngs=rngs)
    self.logits = linear(width, classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, classes), of x, (batch, time, channels)."""
    signals = self.block2(self.block1(x)).transpose(2, 0, 1)
    outputs, cell = self.lstm.read(signals)  # (channels, batch, units)
    asked = jnp.stack([outputs[-1], cell], axis=1)
    weights = jnp.tanh(self.attention(asked))  # (batch, 2, channels)
    sums = jnp.einsum("bqc,cbu->bqu", weights, outputs)
    logits = self.logits(sums.max(axis=1))
    return nnx.softmax(logits) if self.double_softmax else logits


def ecg_attention(
  example_shape: tuple[int, ...],
  num_classes: int,
  width: int = 64,
  double_softmax: bool = False,
) -> Task:
  """Return a network with an LSTM and attention, for heartbeats.

  Args:
    example_shape: (time, channels), time at least 10.
    num_classes: outputs.
    width: channels of the convolutions, and units of the LSTM.
    double_softmax: whether the outputs are probabilities, of which the
      cross-entropy takes the softmax once more, as FLUTE's do: a loss never
      falls below log(1 + (classes - 1) / e).

  Raises:
    TypeError, ValueError: another shape, or an option that is none of these.
  """
  if len(example_shape) != 2 or example_shape[0] < SHORTEST:
    raise ValueError(
      f"ecg_attention: an example has shape {example_shape}; give (time,"
      f" channels), time >= {SHORTEST}."
    )
  length, channels = example_shape
  classes = validate.integer("num_classes", num_classes)
  width = validate.integer("width", width, le=1024)
  double_softmax = validate.boolean("double_softmax", double_softmax)
  return nnx_task(
    lambda rngs: EcgAttention(
      length, channels, classes, width, double_softmax, rngs=rngs
    )
  )
