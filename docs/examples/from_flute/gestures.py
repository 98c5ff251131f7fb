"""The FLUTE task `gestures`, moved here: its model, its metric, its layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim import Task, nnx_task
from fedjax_sim.models.layers import max_pool
from fedjax_sim.models.pytorch import layouts
from fedjax_sim.models.pytorch.layouts import Layer
from fedjax_sim.tasks.metrics import with_metrics


class GestureNet(nnx.Module):
  """A convolution over time, pooling, a linear layer."""

  def __init__(self, shape, classes, width, rngs):
    steps, channels = shape
    self.conv = nnx.Conv(channels, width, (5,), rngs=rngs)
    self.linear = nnx.Linear(steps // 2 * width, classes, rngs=rngs)

  def __call__(self, x):  # (batch, 24, 3): channels last
    x = max_pool(nnx.relu(self.conv(x)))
    return self.linear(x.reshape(x.shape[0], -1))


def top_2(scores, examples):
  """Whether the right gesture is among the two likeliest, shape=(batch,)."""
  _, best = jax.lax.top_k(scores, 2)
  return jnp.any(best == examples["y"][:, None], axis=1)


top_2.higher_is_better = True


def gestures(example_shape, num_classes, width=8) -> Task:
  """Return the task; the shape and the classes are those of the data."""
  task = nnx_task(
    lambda rngs: GestureNet(example_shape, num_classes, width, rngs)
  )
  return with_metrics(task, [top_2])  # cross-entropy and accuracy are there


def layers(width=8, steps=24):
  """Return where PyTorch's module has which array."""
  flat = layouts.linear_after_convolution(width, steps // 2, 1)
  return (
    Layer("conv", "conv", layouts.convolution()),
    Layer("linear", "linear", flat),
  )
