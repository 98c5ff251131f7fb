"""A small 1-D CNN for heartbeats: two convolutions, two dense layers."""

from __future__ import annotations

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import conv, max_pool
from fedjax_sim.tasks import nnx_task


class EcgCNN(nnx.Module):
  """Convolutions 5 x 16, 5 x 32, each with max pooling; 64 units, classes."""

  def __init__(
    self, length: int, channels: int, classes: int, *, rngs: nnx.Rngs
  ):
    self.conv1 = conv(channels, 16, (5,), rngs=rngs)
    self.conv2 = conv(16, 32, (5,), rngs=rngs)
    self.dense1 = nnx.Linear(length // 2 // 2 * 32, 64, rngs=rngs)
    self.dense2 = nnx.Linear(64, classes, rngs=rngs)

  def features(self, x: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, 64)."""
    x = max_pool(nnx.relu(self.conv1(x)))
    x = max_pool(nnx.relu(self.conv2(x)))
    return nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, classes), of x, (batch, time, channels)."""
    return self.dense2(self.features(x))


def ecg_cnn(example_shape: tuple[int, ...], num_classes: int) -> Task:
  """Return a small 1-D CNN with cross-entropy, for heartbeats.

  Args:
    example_shape: (time, channels), time at least 4.
    num_classes: outputs.

  Raises:
    ValueError: another shape.
  """
  if len(example_shape) != 2 or example_shape[0] < 4:
    raise ValueError(
      f"ecg_cnn: an example has shape {example_shape}; give (time, channels),"
      " time >= 4."
    )
  length, channels = example_shape
  classes = validate.integer("num_classes", num_classes)
  return nnx_task(lambda rngs: EcgCNN(length, channels, classes, rngs=rngs))
