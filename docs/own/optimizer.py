"""An optimizer of one's own: steps along the sign of the gradient.

fedjax-sim run --config=docs/own/optimizer.py --workdir=runs/optimizer
"""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from fedjax_sim.config import default_config


def sign_descent(
  learning_rate: float, decay: float = 0.0
) -> optax.GradientTransformation:
  """Each step is -learning_rate * (sign(gradient) + decay * parameters)."""

  def init(params):
    return optax.EmptyState()

  def update(gradient, state, params):
    step = lambda g, p: -learning_rate * (jnp.sign(g) + decay * p)
    return jax.tree.map(step, gradient, params), state

  return optax.GradientTransformation(init, update)


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.client.optimizer = f"{__file__}:sign_descent"
  config.client.learning_rate = 0.03
  config.data.partition = "iid"
  config.client.decay = 0.001  # what the function takes, the config may give
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
