"""Multinomial logistic regression: one linear layer on the flattened input."""

from __future__ import annotations

import math

import jax
from flax import nnx

from fedjax_sim.base import Task
from fedjax_sim.tasks import nnx_task


class LogisticRegression(nnx.Module):
  """`x @ kernel + bias`, from zeros, as the problem is convex."""

  def __init__(self, features: int, classes: int, *, rngs: nnx.Rngs):
    zeros = nnx.initializers.zeros_init()
    self.linear = nnx.Linear(features, classes, kernel_init=zeros, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits, shape=(batch, classes), of x, shape=(batch, ...)."""
    return self.linear(x.reshape(len(x), -1))


def logistic_regression(
  example_shape: tuple[int, ...], num_classes: int
) -> Task:
  """Multinomial logistic regression with cross-entropy."""
  features = math.prod(example_shape)
  return nnx_task(
    lambda rngs: LogisticRegression(features, num_classes, rngs=rngs)
  )
