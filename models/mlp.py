"""A multi-layer perceptron on the flattened input."""

from __future__ import annotations

import itertools
import math

import jax
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.options import several
from fedjax_sim.tasks import nnx_task


class MLP(nnx.Module):
  """Linear layers with ReLU between them."""

  def __init__(self, sizes: tuple[int, ...], *, rngs: nnx.Rngs):
    self.layers = nnx.List(
      nnx.Linear(n_in, n_out, rngs=rngs)
      for n_in, n_out in itertools.pairwise(sizes)
    )

  def features(self, x: jax.Array) -> jax.Array:
    """Return what the last layer takes, shape=(batch, units)."""
    x = x.reshape(x.shape[0], -1)
    for layer in self.layers[:-1]:
      x = nnx.relu(layer(x))
    return x

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, classes), of x, shape=(batch, ...)."""
    return self.layers[-1](self.features(x))


def mlp(
  example_shape: tuple[int, ...],
  num_classes: int,
  hidden_sizes: tuple[int, ...] = (64,),
) -> Task:
  """Return a multi-layer perceptron with cross-entropy.

  Args:
    example_shape: shape of one input.
    num_classes: outputs.
    hidden_sizes: units of each hidden layer.

  Raises:
    TypeError, ValueError: a size or number that is not whole and >= 1.
  """
  given = several(
    "hidden_sizes", hidden_sizes, "a number for each layer", "(64,)"
  )
  hidden = tuple(validate.integer("hidden_sizes", n) for n in given)
  classes = validate.integer("num_classes", num_classes)
  sizes = (math.prod(example_shape), *hidden, classes)
  return nnx_task(lambda rngs: MLP(sizes, rngs=rngs))
