"""Models that do not keep to the contract."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import Loss, Task
from fedjax_sim.models.logistic_regression import logistic_regression


def centered(example_shape, num_classes) -> Task:
  """The loss of an example, less the mean of its batch."""
  base = logistic_regression(example_shape, num_classes)

  def loss(variables, examples, key):
    value, weight, buffers = base.loss(variables, examples, key)
    return Loss((value - jnp.mean(value)) ** 2, weight, buffers)

  return base._replace(loss=loss)


def rooted(example_shape, num_classes) -> Task:
  """The root of a loss that is 0 at first, where it has no derivative."""
  base = logistic_regression(example_shape, num_classes)

  def loss(variables, examples, key):
    value, weight, buffers = base.loss(variables, examples, key)
    return Loss(jnp.sqrt(0 * value), weight, buffers)

  return base._replace(loss=loss)


def drawn(example_shape, num_classes) -> Task:
  """A model that begins somewhere else each time."""
  base = logistic_regression(example_shape, num_classes)

  def init(key):
    shift = np.random.default_rng().normal()
    return jax.tree.map(lambda x: x + shift, base.init(key))

  return base._replace(init=init)
