"""Multinomial logistic regression: one linear layer on the flattened input."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import ZEROS, Initializer, uniform
from fedjax_sim.tasks import nnx_task

INITS: dict[str, Callable[[int], Initializer]] = {  # features -> initializer
  "zeros": lambda features: ZEROS,
  "uniform": uniform,
}


class LogisticRegression(nnx.Module):
  """`x @ kernel + bias`; from zeros by default, as the problem is convex."""

  def __init__(
    self,
    features: int,
    classes: int,
    *,
    init: str = "zeros",
    sigmoid: bool = False,
    rngs: nnx.Rngs,
  ):
    draw = INITS[init](features)
    self.linear = nnx.Linear(
      features, classes, kernel_init=draw, bias_init=draw, rngs=rngs
    )
    self.sigmoid = sigmoid

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, classes), of x, shape=(batch, ...)."""
    logits = self.linear(x.reshape(x.shape[0], -1))
    return nnx.sigmoid(logits) if self.sigmoid else logits


def logistic_regression(
  example_shape: tuple[int, ...],
  num_classes: int,
  init: str = "zeros",
  sigmoid: bool = False,
) -> Task:
  """Return multinomial logistic regression with cross-entropy.

  Args:
    example_shape: shape of one input.
    num_classes: outputs.
    init: what weights and biases begin with: `zeros`, or `uniform`, PyTorch's
      default draws between -1 and 1, divided by the root of the features.
    sigmoid: whether the outputs go through a sigmoid, and the cross-entropy
      takes the softmax of those, as in FLUTE: a loss never falls below
      log(1 + (classes - 1) / e).

  Raises:
    TypeError, ValueError: a number of classes that is not whole and >= 1, or an
      option that is none of these.
  """
  features = math.prod(example_shape)
  classes = validate.integer("num_classes", num_classes)
  validate.one_of("init", init, INITS)
  sigmoid = validate.boolean("sigmoid", sigmoid)
  return nnx_task(
    lambda rngs: LogisticRegression(
      features, classes, init=init, sigmoid=sigmoid, rngs=rngs
    )
  )
