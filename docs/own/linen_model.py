"""A model of one's own in flax.linen, with a loss of one's own.

fedjax-sim run --config=docs/own/linen_model.py --workdir=runs/linen_model
"""

import jax
import jax.numpy as jnp
from flax import linen
from ml_collections import ConfigDict

from fedjax_sim import Task, linen_task
from fedjax_sim.config import default_config


class Network(linen.Module):
  """Two dense layers with dropout between them."""

  classes: int
  hidden: int

  @linen.compact
  def __call__(self, x, deterministic):
    """Return logits, (batch, classes), of x, shape=(batch, features)."""
    h = linen.relu(linen.Dense(self.hidden)(x))
    h = linen.Dropout(0.2)(h, deterministic=deterministic)
    return linen.Dense(self.classes)(h)


def focal(logits, examples):
  """Return the loss of Lin et al. 2017 (arXiv 1708.02002) with gamma 2."""
  log = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log, examples["y"][:, None], axis=1)[:, 0]
  value = -((1 - jnp.exp(picked)) ** 2) * picked
  return value, jnp.ones_like(value)  # of each example, and its weight


def focal_network(example_shape, num_classes, hidden=64) -> Task:
  """Return the network with the focal loss."""
  return linen_task(
    Network(num_classes, hidden),
    jax.ShapeDtypeStruct((1, *example_shape), jnp.float32),
    loss=focal,
    apply_kwargs=lambda train: {"deterministic": not train},
  )


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.model.name = f"{__file__}:focal_network"
  config.model.hidden = 32
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
