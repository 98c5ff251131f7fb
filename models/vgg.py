"""VGG networks of 11 to 19 layers, with or without batch normalization.

Simonyan and Zisserman 2015 (arXiv 1409.1556), configurations A, B, D and E.
For small images the dense layers have 512 units instead of 4,096, as is usual
for CIFAR-10; dropout comes before each of the first two.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import (
  HE_NORMAL,
  batch_norm,
  conv,
  linear,
  max_pool,
)
from fedjax_sim.tasks import nnx_task

CONVOLUTIONS = {  # of each of the five stages, which max pooling ends
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}
FEATURES = (1, 2, 4, 8, 8)  # of each stage, by those of the first
NORMS = ("none", "batch")


class VGG(nnx.Module):
  """Five stages of 3 x 3 convolutions, two dense layers, classes."""

  def __init__(
    self,
    shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int,
    normalized: bool,
    dropout: float,
    width: int,
    rngs: nnx.Rngs,
  ):
    rows, columns, features = shape
    stages = []
    for count, factor in zip(CONVOLUTIONS[depth], FEATURES, strict=True):
      layers: list[Callable[[jax.Array], jax.Array]] = []
      for _ in range(count):
        layers.append(
          conv(
            features,
            width * factor,
            (3, 3),
            padding=1,
            kernel_init=HE_NORMAL,
            rngs=rngs,
          )
        )
        features = width * factor
        if normalized:
          layers.append(batch_norm(features, rngs=rngs))
        layers.append(nnx.relu)
      stages.append(nnx.Sequential(*layers))
    self.stages = nnx.List(stages)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    flat = features * (rows // 32) * (columns // 32)
    self.dense1 = linear(flat, features, rngs=rngs)
    self.dense2 = linear(features, features, rngs=rngs)
    self.dense3 = linear(features, classes, rngs=rngs)

  def features(self, x: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, units)."""
    for stage in self.stages:
      x = max_pool(stage(x))
    x = x.reshape(x.shape[0], -1)
    for dense in (self.dense1, self.dense2):
      x = nnx.relu(dense(self.dropout(x)))
    return x

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, (batch, classes), of (batch, height, width, channels)."""
    return self.dense3(self.features(x))


def vgg(
  example_shape: tuple[int, ...],
  num_classes: int,
  depth: int = 16,
  norm: str = "none",
  dropout: float = 0.5,
  width: int = 64,
) -> Task:
  """Return a VGG network with cross-entropy, for small images.

  Args:
    example_shape: (height, width, channels), both sides at least 32.
    num_classes: outputs.
    depth: layers: 11, 13, 16 or 19.
    norm: after each convolution: `none`, or `batch`, which makes an example's
      loss depend on the rest of its batch.
    dropout: rate before each of the first two dense layers.
    width: features of the first stage; 64 is the paper's.

  Raises:
    TypeError, ValueError: another shape, or an option that is none of these.
  """
  shape = validate.image_shape("vgg", example_shape, ge=32)
  classes = validate.integer("num_classes", num_classes)
  if validate.integer("depth", depth) not in CONVOLUTIONS:
    known = ", ".join(map(str, CONVOLUTIONS))
    raise ValueError(f"depth={depth} is no VGG here; give one of {known}.")
  normalized = validate.one_of("norm", norm, NORMS) == "batch"
  rate = validate.number("dropout", dropout, ge=0, le=1)
  width = validate.integer("width", width, le=1024)
  return nnx_task(
    lambda rngs: VGG(
      shape,
      classes,
      depth=depth,
      normalized=normalized,
      dropout=rate,
      width=width,
      rngs=rngs,
    )
  )
