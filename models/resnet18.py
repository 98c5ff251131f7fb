"""ResNet-18 with group normalization, for small images.

He et al. 2016 (arXiv 1512.03385), with a 3 x 3 stem of stride 1 and without
its pooling, as is usual for images of 24 to 32 pixels; group instead of batch
normalization, in two groups, as in Reddi et al. 2021 (arXiv 2003.00295).
"""

from __future__ import annotations

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import conv
from fedjax_sim.tasks import nnx_task


class Block(nnx.Module):
  """Two 3 x 3 convolutions and what goes around them."""

  def __init__(
    self, features_in: int, features: int, strides: int, *, rngs: nnx.Rngs
  ):
    def layer(n_in: int, size: int, strides: int) -> nnx.Conv:
      return conv(
        n_in, features, (size, size), strides=strides, use_bias=False, rngs=rngs
      )

    norm = lambda: nnx.GroupNorm(features, num_groups=2, rngs=rngs)
    self.conv1, self.norm1 = layer(features_in, 3, strides), norm()
    self.conv2, self.norm2 = layer(features, 3, 1), norm()
    self.around: nnx.Sequential | None = nnx.data(None)
    if strides != 1 or features_in != features:
      self.around = nnx.Sequential(layer(features_in, 1, strides), norm())

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the block's features of x, (batch, height, width, features_in)."""
    y = nnx.relu(self.norm1(self.conv1(x)))
    y = self.norm2(self.conv2(y))
    return nnx.relu(y + (x if self.around is None else self.around(x)))


class ResNet18(nnx.Module):
  """A stem, four stages of two blocks, the mean over space, classes."""

  def __init__(self, channels: int, width: int, classes: int, rngs: nnx.Rngs):
    self.stem = conv(channels, width, (3, 3), use_bias=False, rngs=rngs)
    self.norm = nnx.GroupNorm(width, num_groups=2, rngs=rngs)
    blocks, features = [], width
    for stage in range(4):
      for strides in (1 if stage == 0 else 2, 1):
        blocks.append(Block(features, width << stage, strides, rngs=rngs))
        features = width << stage
    self.blocks = nnx.List(blocks)
    self.logits = nnx.Linear(features, classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, (batch, classes), of (batch, height, width, channels)."""
    x = nnx.relu(self.norm(self.stem(x)))
    for block in self.blocks:
      x = block(x)
    return self.logits(x.mean((1, 2)))


def resnet18(
  example_shape: tuple[int, ...], num_classes: int, width: int = 64
) -> Task:
  """Return ResNet-18 with group norm and cross-entropy, for small images.

  Args:
    example_shape: (height, width, channels), both sides at least 8.
    num_classes: outputs.
    width: features of the first stage, even; 64 is the paper's.

  Raises:
    TypeError, ValueError: another shape, or a width that is not such a number.
  """
  _, _, channels = validate.image_shape("resnet18", example_shape, ge=8)
  classes = validate.integer("num_classes", num_classes)
  width = validate.integer("width", width, ge=2)
  if width % 2:
    raise ValueError(f"width={width} is odd; give an even number.")
  return nnx_task(lambda rngs: ResNet18(channels, width, classes, rngs))
