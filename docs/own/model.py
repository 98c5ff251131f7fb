"""A model of one's own: a small convolutional network, in Flax.

fedjax-sim run --config=docs/own/model.py --workdir=runs/model
"""

from flax import nnx
from ml_collections import ConfigDict

from fedjax_sim import Task, nnx_task
from fedjax_sim.config import default_config


class Network(nnx.Module):
  """A convolution, batch norm, and a linear layer that sees all of it."""

  def __init__(self, side, classes, channels, rngs):
    self.conv = nnx.Conv(1, channels, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(channels, rngs=rngs)
    self.linear = nnx.Linear(side * side * channels, classes, rngs=rngs)

  def __call__(self, x):
    """Return logits, (batch, classes), of x, shape=(batch, side * side)."""
    side = round(x.shape[1] ** 0.5)
    x = nnx.relu(self.norm(self.conv(x.reshape(-1, side, side, 1))))
    return self.linear(x.reshape(len(x), -1))


def small_cnn(example_shape, num_classes, channels=8) -> Task:
  """Return a convolution and a linear layer for square images, as rows."""
  side = round(example_shape[0] ** 0.5)
  return nnx_task(lambda rngs: Network(side, num_classes, channels, rngs))


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.model.name = f"{__file__}:small_cnn"
  config.model.channels = 4
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
