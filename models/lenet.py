"""LeNet for color images: two convolutions, three dense layers.

After LeCun et al. 1998, "Gradient-based learning applied to document
recognition", with ReLU and max pooling as in PyTorch's tutorial for CIFAR-10,
and with PyTorch's default draws.
"""

from __future__ import annotations

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import conv, linear, max_pool, uniform
from fedjax_sim.tasks import nnx_task


class LeNet(nnx.Module):
  """Convolutions 5 x 5 x 6 and 5 x 5 x 16, each pooled; 120, 84, classes."""

  def __init__(
    self, shape: tuple[int, int, int], classes: int, *, rngs: nnx.Rngs
  ):
    height, width, channels = shape
    self.conv1 = self._conv(channels, 6, rngs)
    self.conv2 = self._conv(6, 16, rngs)
    left = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    self.dense1 = linear(left[0] * left[1] * 16, 120, rngs=rngs)
    self.dense2 = linear(120, 84, rngs=rngs)
    self.dense3 = linear(84, classes, rngs=rngs)

  @staticmethod
  def _conv(features_in: int, features: int, rngs: nnx.Rngs) -> nnx.Conv:
    draw = uniform(5 * 5 * features_in)
    return conv(
      features_in,
      features,
      (5, 5),
      padding="VALID",
      kernel_init=draw,
      bias_init=draw,
      rngs=rngs,
    )

  def features(self, x: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, 84)."""
    x = max_pool(nnx.relu(self.conv1(x)))
    x = max_pool(nnx.relu(self.conv2(x)))
    x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
    return nnx.relu(self.dense2(x))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, (batch, classes), of (batch, height, width, channels)."""
    return self.dense3(self.features(x))


def lenet(example_shape: tuple[int, ...], num_classes: int) -> Task:
  """Return LeNet with cross-entropy, for small images.

  Args:
    example_shape: (height, width, channels), both sides at least 16.
    num_classes: outputs.

  Raises:
    TypeError, ValueError: another shape, or a number of classes that is not
      whole and >= 1.
  """
  shape = validate.image_shape("lenet", example_shape, ge=16)
  classes = validate.integer("num_classes", num_classes)
  return nnx_task(lambda rngs: LeNet(shape, classes, rngs=rngs))
