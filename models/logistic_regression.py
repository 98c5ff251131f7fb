"""Multinomial logistic regression: one linear layer on the flattened input."""

from __future__ import annotations

import math

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.tasks import nnx_task


class LogisticRegression(nnx.Module):
  """`x @ kernel + bias`, from zeros, as the problem is convex."""

  def __init__(self, features: int, classes: int, *, rngs: nnx.Rngs):
    zeros = nnx.initializers.zeros_init()
    self.linear = nnx.Linear(features, classes, kernel_init=zeros, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, classes), of x, shape=(batch, ...)."""
    return self.linear(x.reshape(x.shape[0], -1))


def logistic_regression(
  example_shape: tuple[int, ...], num_classes: int
) -> Task:
  """Return multinomial logistic regression with cross-entropy.

  Args:
    example_shape: shape of one input.
    num_classes: outputs.

  Raises:
    TypeError, ValueError: a number of classes that is not whole and >= 1.
  """
  features = math.prod(example_shape)
  classes = validate.integer("num_classes", num_classes)
  return nnx_task(lambda rngs: LogisticRegression(features, classes, rngs=rngs))
