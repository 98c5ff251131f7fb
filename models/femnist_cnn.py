"""The FEMNIST CNN: two convolutions, two dense layers, dropout.

Reddi et al. 2021, "Adaptive federated optimization" (arXiv 2003.00295), table
4: the CNN for EMNIST that TensorFlow Federated, FedJAX and FLUTE share.
"""

from __future__ import annotations

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import conv, max_pool
from fedjax_sim.models.options import several
from fedjax_sim.tasks import nnx_task


class FemnistCNN(nnx.Module):
  """Convolutions 3 x 3 x 32 and 3 x 3 x 64, max pooling, 128 units, classes."""

  def __init__(
    self,
    shape: tuple[int, int, int],
    classes: int,
    dropout: tuple[float, float],
    *,
    rngs: nnx.Rngs,
  ):
    height, width, channels = shape
    window = (3, 3)
    self.conv1 = conv(channels, 32, window, padding="VALID", rngs=rngs)
    self.conv2 = conv(32, 64, window, padding="VALID", rngs=rngs)
    self.dropout1 = nnx.Dropout(dropout[0], rngs=rngs)
    features = (height - 4) // 2 * ((width - 4) // 2) * 64
    self.dense1 = nnx.Linear(features, 128, rngs=rngs)
    self.dropout2 = nnx.Dropout(dropout[1], rngs=rngs)
    self.dense2 = nnx.Linear(128, classes, rngs=rngs)

  def features(self, x: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, 128)."""
    x = nnx.relu(self.conv1(x))
    x = max_pool(nnx.relu(self.conv2(x)))
    x = self.dropout1(x).reshape(x.shape[0], -1)
    return self.dropout2(nnx.relu(self.dense1(x)))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, (batch, classes), of (batch, height, width, channels)."""
    return self.dense2(self.features(x))


def femnist_cnn(
  example_shape: tuple[int, ...],
  num_classes: int,
  dropout: tuple[float, float] = (0.25, 0.5),
) -> Task:
  """Return the FEMNIST CNN with cross-entropy: 2 convolutions, 2 dense layers.

  Args:
    example_shape: (height, width, channels), both sides at least 6.
    num_classes: outputs.
    dropout: rates after the convolutions and before the last layer.

  Raises:
    TypeError, ValueError: another shape, a rate outside 0..1, or not two.
  """
  shape = validate.image_shape("femnist_cnn", example_shape, ge=6)
  classes = validate.integer("num_classes", num_classes)
  what, example = "two rates", "(0.25, 0.5)"
  rates = several("dropout", dropout, what, example)
  if len(rates) != 2:
    raise ValueError(f"dropout={dropout!r}; give {what}, {example}.")
  first, second = (
    validate.number("dropout", rate, ge=0, le=1) for rate in rates
  )
  return nnx_task(
    lambda rngs: FemnistCNN(shape, classes, (first, second), rngs=rngs)
  )
