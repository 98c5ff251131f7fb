"""What a transformer computes at every position by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from flax import nnx

Activation = Callable[[jax.Array], jax.Array]
Initializer = jax.nn.initializers.Initializer


def _gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Activation] = {
  "gelu": _gelu,
  "gelu_new": jax.nn.gelu,  # by tanh, as in GPT-2
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


class FeedForward(nnx.Module):
  """Two linear layers around an activation; gated, three (SwiGLU with silu).

  Shazeer 2020, "GLU variants improve transformer" (arXiv 2002.05202).

  Args:
    width: of the input and the output.
    inner: units in between.
    activation: one of `ACTIVATIONS`.
    gated: whether the activations of a third layer multiply the units.
    bias: whether the layers have biases.
    kernel_init: of all kernels but the last.
    output_init: of the last.
    rngs: draws the kernels.
  """

  def __init__(
    self,
    width: int,
    inner: int,
    *,
    activation: str,
    gated: bool,
    bias: bool,
    kernel_init: Initializer,
    output_init: Initializer,
    rngs: nnx.Rngs,
  ):
    def layer(n_in: int, n_out: int, init: Initializer) -> nnx.Linear:
      return nnx.Linear(n_in, n_out, use_bias=bias, kernel_init=init, rngs=rngs)

    self.gate: nnx.Linear | None = nnx.data(None)
    if gated:
      self.gate = layer(width, inner, kernel_init)
    self.inner = layer(width, inner, kernel_init)
    self.outer = layer(inner, width, output_init)
    self.activation = ACTIVATIONS[activation]

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the outputs, shape=(batch, time, width), of x of that shape."""
    if self.gate is None:
      return self.outer(self.activation(self.inner(x)))
    return self.outer(self.activation(self.gate(x)) * self.inner(x))
