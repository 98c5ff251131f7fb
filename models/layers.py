"""Layers that are fast where clients train, on every backend.

`docs/performance.md` has the measurements. On a CPU tasks compute convolution
and pooling of any model in this way (`tasks/fast_layers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fedjax_sim.tasks.convolution import convolve
from fedjax_sim.tasks.pooling import maximum

Array = jax.Array


# --- convolution and pooling --------------------------------------------------


def conv(
  features_in: int,
  features_out: int,
  kernel_size: Sequence[int],
  *,
  strides: int = 1,
  padding: str = "SAME",
  use_bias: bool = True,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """Return an `nnx.Conv` that computes as `convolve` does."""
  return nnx.Conv(
    features_in,
    features_out,
    tuple(kernel_size),
    strides=strides,
    padding=padding,
    use_bias=use_bias,
    conv_general_dilated=convolve,
    rngs=rngs,
  )


def max_pool(x: Array, size: int = 2) -> Array:
  """Return maxima over windows of `size` in every spatial dimension.

  What does not fill a window is left out.

  Args:
    x: shape=(batch, *space, features).
    size: of the window, and its stride.
  """
  window = (1, *(size,) * (x.ndim - 2), 1)
  return maximum(x, window, window)


# --- recurrence ---------------------------------------------------------------


@jax.custom_vjp
def lstm(gates: Array, kernel: Array) -> Array:
  """Run an LSTM over whole sequences, from a zero state.

  Hochreiter and Schmidhuber 1997, with forget gates. What depends on the input
  alone comes as an argument, one product for all steps. The gradient is
  written by hand: all that is elementwise is computed before the loop back,
  and the kernel's gradient is one product after it. So there is reverse mode
  only, `jax.grad` and `jax.vjp`, but no `jax.jvp`.

  Args:
    gates: shape=(time, batch, 4 * units); the inputs' part of the gates i, f,
      g, o, biases included.
    kernel: shape=(units, 4 * units); from the state to the gates. Computed
      in the gates' dtype; its gradient has its own.

  Returns:
    The outputs, shape=(time, batch, units), in the gates' dtype.
  """
  return _lstm_forward(gates, kernel)[0]


def _opened(tanhs: Array) -> tuple[Array, Array, Array, Array]:
  """Return i, f, g, o from tanh(z / 2), but tanh(z) for g."""
  i, f, g, o = jnp.split(tanhs, 4, axis=-1)
  sigmoid = lambda x: 0.5 * x + 0.5  # one tanh is faster than two functions
  return sigmoid(i), sigmoid(f), g, sigmoid(o)


def _lstm_forward(gates: Array, kernel: Array) -> tuple[Array, Any]:
  units = kernel.shape[0]
  halves = np.full(4 * units, 0.5)
  halves[2 * units : 3 * units] = 1
  scale = jnp.asarray(halves, gates.dtype)
  scaled = kernel.astype(gates.dtype) * scale[None]

  def step(state: tuple[Array, Array], z: Array) -> tuple[Any, Any]:
    h, c = state
    tanhs = jnp.tanh(z + h @ scaled)
    i, f, g, o = _opened(tanhs)
    new = f * c + i * g
    t = jnp.tanh(new)
    return (o * t, new), (o * t, tanhs, c, t)

  zero = jnp.zeros((*gates.shape[1:-1], units), gates.dtype)
  _, (hs, tanhs, cs, ts) = lax.scan(
    step, (zero, zero), gates * scale[None, None]
  )
  return hs, (hs, tanhs, cs, ts, kernel)


def _lstm_backward(saved: Any, dhs: Array) -> tuple[Array, Array]:
  hs, tanhs, cs, ts, kernel = saved
  i, f, g, o = _opened(tanhs)
  # What a gate's z changes in c, and in h beside it; what h takes from c.
  by_c = jnp.concatenate(
    [g * i * (1 - i), cs * f * (1 - f), i * (1 - g * g)], axis=-1
  )
  by_h = ts * o * (1 - o)
  h_by_c = o * (1 - ts * ts)
  back = kernel.astype(dhs.dtype).T

  def step(state: tuple[Array, Array], given: Any) -> tuple[Any, Array]:
    dh, dc = state
    more, by_c, by_h, h_by_c, f = given
    dh = dh + more
    dc = dc + dh * h_by_c
    dz = jnp.concatenate([jnp.tile(dc, 3) * by_c, dh * by_h], axis=-1)
    return (dz @ back, dc * f), dz

  zero = jnp.zeros_like(dhs[0])
  factors = (dhs, by_c, by_h, h_by_c, f)
  _, dz = lax.scan(step, (zero, zero), factors, reverse=True)
  flat = lambda x: x.reshape(-1, x.shape[-1])
  by_kernel = flat(hs[:-1]).T @ flat(dz[1:])
  return dz, by_kernel.astype(kernel.dtype)


lstm.defvjp(_lstm_forward, _lstm_backward)


class LSTM(nnx.Module):
  """A layer that reads whole sequences; see `lstm`.

  Args:
    features: of an input at one time.
    units: of the state, and so of an output.
    rngs: draws the kernels; the recurrent ones of the four gates are
      orthogonal.
  """

  def __init__(self, features: int, units: int, *, rngs: nnx.Rngs):
    self.inputs = nnx.Linear(features, 4 * units, rngs=rngs)
    orthogonal = nnx.initializers.orthogonal()
    self.recurrent = nnx.Param(
      jnp.concatenate(
        [orthogonal(rngs.params(), (units, units)) for _ in range(4)], axis=1
      )
    )

  def __call__(self, x: Array) -> Array:
    """Return outputs, (time, batch, units), of x, (time, batch, features)."""
    return lstm(self.inputs(x), self.recurrent[...])
