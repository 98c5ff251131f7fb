"""ResNets of 18 to 152 layers, with batch or group normalization.

He et al. 2016 (arXiv 1512.03385), as torchvision builds them: strides are in
the 3 x 3 convolution of a bottleneck, and convolutions begin with He's normal
draws by fan out. For images of 24 to 32 pixels the stem is usually a 3 x 3
convolution; group normalization in two groups is that of Reddi et al. 2021
(arXiv 2003.00295).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import (
  HE_NORMAL,
  ONES,
  ZEROS,
  Initializer,
  batch_norm,
  conv,
  group_norm,
  linear,
  max_pool,
)
from fedjax_sim.tasks import nnx_task

Norm = Callable[..., nnx.Module]  # (features, scale_init=, rngs=)

BLOCKS = {  # of each of the four stages
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
}
DEPTHS_OF_TWO = (18, 34)  # whose blocks have two convolutions; others three
EXPANSION = 4  # features that leave a block of three, by those inside
STEMS = ("3x3", "7x7")
NORMS = ("batch", "group")


class Block(nnx.Module):
  """Two or three convolutions, and what goes around them.

  Args:
    features_in: of the input.
    features: of the convolutions; a bottleneck has four times as many outputs.
    strides: of the first 3 x 3 convolution.
    bottleneck: whether there are three convolutions, 1 x 1, 3 x 3 and 1 x 1,
      instead of two of 3 x 3.
    norm: makes the normalization after each of them.
    last_scale: draws the scale of the last normalization.
    rngs: random streams.
  """

  def __init__(
    self,
    features_in: int,
    features: int,
    strides: int,
    bottleneck: bool,
    norm: Norm,
    last_scale: Initializer,
    *,
    rngs: nnx.Rngs,
  ):
    outputs = features * EXPANSION if bottleneck else features
    layers = [(features, 3, strides), (outputs, 3, 1)]
    if bottleneck:
      layers = [(features, 1, 1), (features, 3, strides), (outputs, 1, 1)]
    convs, norms, before = [], [], features_in
    for i, (after, size, step) in enumerate(layers, 1):
      scale = last_scale if i == len(layers) else ONES
      convs.append(_conv(before, after, size, step, rngs))
      norms.append(norm(after, scale_init=scale, rngs=rngs))
      before = after
    self.convs, self.norms = nnx.List(convs), nnx.List(norms)
    self.around: nnx.Sequential | None = nnx.data(None)
    if strides != 1 or features_in != outputs:
      self.around = nnx.Sequential(
        _conv(features_in, outputs, 1, strides, rngs),
        norm(outputs, scale_init=ONES, rngs=rngs),
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the block's features of x, (batch, height, width, features_in)."""
    y = x
    for i, (layer, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
      y = norm(layer(nnx.relu(y) if i else y))
    return nnx.relu(y + (x if self.around is None else self.around(x)))


class ResNet(nnx.Module):
  """A stem, four stages of blocks, the mean over space, classes."""

  def __init__(
    self,
    channels: int,
    classes: int,
    *,
    depth: int,
    stem: str,
    width: int,
    norm: Norm,
    last_scale: Initializer = ONES,
    rngs: nnx.Rngs,
  ):
    self.pools = stem == "7x7"
    size, strides = (7, 2) if self.pools else (3, 1)
    self.stem = _conv(channels, width, size, strides, rngs)
    self.norm = norm(width, scale_init=ONES, rngs=rngs)
    bottleneck = depth not in DEPTHS_OF_TWO
    blocks, features = [], width
    for stage, count in enumerate(BLOCKS[depth]):
      for i in range(count):
        inside, strides = width << stage, 2 if stage and i == 0 else 1
        blocks.append(
          Block(
            features, inside, strides, bottleneck, norm, last_scale, rngs=rngs
          )
        )
        features = inside * (EXPANSION if bottleneck else 1)
    self.blocks = nnx.List(blocks)
    self.logits = linear(features, classes, rngs=rngs)

  def features(self, x: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, features)."""
    x = nnx.relu(self.norm(self.stem(x)))
    if self.pools:
      x = max_pool(x, 3, strides=2, padding=1)
    for block in self.blocks:
      x = block(x)
    return x.mean((1, 2))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, (batch, classes), of (batch, height, width, channels)."""
    return self.logits(self.features(x))


def resnet(
  example_shape: tuple[int, ...],
  num_classes: int,
  depth: int = 18,
  stem: str = "3x3",
  norm: str = "group",
  groups: int = 2,
  width: int = 64,
  zero_scale: bool = False,
) -> Task:
  """Return a ResNet with cross-entropy, for images.

  Args:
    example_shape: (height, width, channels), both sides at least 8.
    num_classes: outputs.
    depth: layers: 18, 34, 50, 101 or 152.
    stem: the first layer: `3x3`, a convolution of stride 1, for small images;
      or `7x7`, one of stride 2, and max pooling, which leave a sixteenth.
    norm: after each convolution: `group`, or `batch`, which makes an example's
      loss depend on the rest of its batch.
    groups: of `group`; has to divide `width`.
    width: features of the first stage; 64 is the paper's.
    zero_scale: the scale of each block's last normalization begins at 0, and
      so each block as the identity.

  Raises:
    TypeError, ValueError: another shape, or an option that is none of these.
  """
  _, _, channels = validate.image_shape("resnet", example_shape, ge=8)
  classes = validate.integer("num_classes", num_classes)
  if validate.integer("depth", depth) not in BLOCKS:
    known = ", ".join(map(str, BLOCKS))
    raise ValueError(f"depth={depth} is no ResNet here; give one of {known}.")
  validate.one_of("stem", stem, STEMS)
  width = validate.integer("width", width, le=1024)
  groups = validate.integer("groups", groups)
  normalize: Norm = batch_norm
  if validate.one_of("norm", norm, NORMS) == "group":
    if width % groups:
      raise ValueError(
        f"groups={groups} does not divide width={width}; give a divisor."
      )
    normalize = functools.partial(group_norm, groups=groups)
  last = ZEROS if validate.boolean("zero_scale", zero_scale) else ONES
  return nnx_task(
    lambda rngs: ResNet(
      channels,
      classes,
      depth=depth,
      stem=stem,
      width=width,
      norm=normalize,
      last_scale=last,
      rngs=rngs,
    )
  )


def _conv(
  features_in: int, features: int, size: int, strides: int, rngs: nnx.Rngs
) -> nnx.Conv:
  """Return a convolution without bias that pads both sides alike."""
  return conv(
    features_in,
    features,
    (size, size),
    strides=strides,
    padding=size // 2,
    use_bias=False,
    kernel_init=HE_NORMAL,
    rngs=rngs,
  )
