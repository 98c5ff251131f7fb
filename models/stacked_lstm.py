"""Stacked LSTM layers of equal size that take their steps together.

On a GPU a step of a small layer takes as long as launching its kernels does. So
layers run as a wavefront: while one reads a chunk of the sequence, the layer
above it reads the chunk before. A step of all layers is one product, with a
batch of layers, and one kernel for what is elementwise; what layers say to
those above is one product a chunk. It computes what `layers.lstm` does, layer
by layer, in another order.

Appleyard et al. 2016 (arXiv 1604.01946), section 3.3, have wavefronts of steps.
With chunks a layer's kernels are read once a step, and not those between
layers, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.models.layers import LSTM

Array = jax.Array

# Steps in a chunk, at most. With longer ones there are fewer chunks, each of
# which has kernels of its own, but more steps at the ends, where a layer waits.
CHUNK = 10


def read(layers: Sequence[LSTM], x: Array) -> Array:
  """Run layers one above the other, in the form that is fast on the backend.

  Args:
    layers: one or more.
    x: shape=(time, batch, features).

  Returns:
    The last layer's outputs, shape=(time, batch, units).
  """
  first, *others = layers
  shapes = {layer.recurrent.shape for layer in layers}
  if jax.default_backend() == "cpu" or not others or len(shapes) > 1:
    for layer in layers:
      x = layer(x)
    return x
  return stacked_lstm(
    first.gates(x),
    jnp.stack([layer.recurrent[...] for layer in layers]),
    jnp.stack([layer.inputs.kernel[...] for layer in others]),
    jnp.stack([layer.bias for layer in others]),
  )


@jax.custom_vjp
def stacked_lstm(
  gates: Array, kernels: Array, between: Array, biases: Array
) -> Array:
  """Run LSTM layers of equal size over whole sequences, from zero states.

  The gradient is written by hand: reverse mode only, as of `layers.lstm`.

  Args:
    gates: shape=(time, batch, 4 * units), time at least 1; the inputs' part of
      the first layer's gates i, f, g, o, biases included.
    kernels: shape=(layers, units, 4 * units), layers at least 2; from each
      layer's state to its gates. All is computed in the gates' dtype;
      gradients have their own.
    between: shape=(layers - 1, units, 4 * units); from each layer's outputs to
      the gates of the one above.
    biases: shape=(layers - 1, 4 * units); of all layers but the first.

  Returns:
    The last layer's outputs, shape=(time, batch, units), in the gates' dtype.
  """
  return _forward(gates, kernels, between, biases)[0]


def _plan(time: int, layers: int) -> tuple[int, int]:
  """Return how many chunks pass until the last layer ends, and their size."""
  chunks = -(-time // CHUNK)
  return chunks + layers - 1, -(-time // chunks)


def _padded(x: Array, before: int, after: int, axis: int = 0) -> Array:
  """Return x with zeros before and after along an axis."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (before, after)
  return jnp.pad(x, widths)


def _opened(z: Array) -> Array:
  """Return the gates i, f, g, o of their sums."""
  i, f, g, o = jnp.split(z, 4, axis=-1)
  sigmoid = jax.nn.sigmoid
  return jnp.concatenate([sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)], -1)


def _forward(
  gates: Array, kernels: Array, between: Array, biases: Array
) -> tuple[Array, Any]:
  time, batch, wide = gates.shape
  layers, units = kernels.shape[:2]
  chunks, size = _plan(time, layers)
  own, up, bias = (
    x.astype(gates.dtype) for x in (kernels, between, biases[:, None])
  )

  # Barriers, as otherwise XLA computes in every step all of those before it.
  def step(state: tuple[Array, Array], z: Array) -> tuple[Any, Any]:
    h, c = state
    opened = _opened(z + jnp.einsum("lbi,lij->lbj", h, own))
    i, f, g, o = jnp.split(opened, 4, axis=-1)
    kept = f * c
    c = kept + i * g
    h, c, kept = lax.optimization_barrier((o * jnp.tanh(c), c, kept))
    saved = jnp.concatenate([h, opened, kept, jnp.tanh(c)], axis=-1)
    return (h, c), (h, saved)

  # A layer that has not begun has gates of zero, and so its state stays zero;
  # what one computes after its end is dropped.
  def chunk(carry: Any, given: tuple[Array, Array]) -> tuple[Any, Array]:
    state, others = carry
    begun, z = given
    others = jnp.where(begun[None, :, None, None], others + bias[None], 0)
    z = lax.optimization_barrier(jnp.concatenate([z, others], axis=1))
    state, (h, saved) = lax.scan(step, state, z, unroll=True)
    return (state, jnp.einsum("klbi,lij->klbj", h[:, :-1], up)), saved

  zero = jnp.zeros((layers, batch, units), gates.dtype)
  others = jnp.zeros((size, layers - 1, batch, wide), gates.dtype)
  z = _padded(gates, 0, chunks * size - time)
  z = z.reshape(chunks, size, 1, batch, wide)
  begun = jnp.arange(chunks)[:, None] >= jnp.arange(1, layers)[None]
  _, saved = lax.scan(chunk, ((zero, zero), others), (begun, z))
  start = (layers - 1) * size
  last = saved[:, :, -1, :, :units].reshape(chunks * size, batch, units)
  return last[start : start + time], (saved, kernels, between, biases)


def _backward(residuals: Any, slopes: Array) -> tuple[Array, ...]:
  saved, kernels, between, biases = residuals
  time, batch, units = slopes.shape
  layers, wide = len(kernels), 4 * units
  chunks, size = _plan(time, layers)
  own, up = (x.astype(slopes.dtype) for x in (kernels, between))

  def step(state: tuple[Array, Array], given: Any) -> tuple[Any, Array]:
    dz, dc = state
    others, last, saved = given
    _, i, f, g, o, kept, t = jnp.split(saved, 7, axis=-1)
    dh = jnp.einsum("lbj,lij->lbi", dz, own)
    dh += _padded(others, 0, 1) + _padded(last, layers - 1, 0)
    dc = dc[..., :units] + dh * o * (1 - t * t)
    by_c = jnp.concatenate(
      [g * i * (1 - i), kept * (1 - f), i * (1 - g * g)], axis=-1
    )
    # One kernel computes both, as they have one shape and are no concatenation.
    dz = _padded(jnp.tile(dc, 3) * by_c, 0, units, -1)
    dz += _padded(dh * t * o * (1 - o), 3 * units, 0, -1)
    dc = _padded(dc * f, 0, 3 * units, -1)
    dz, dc = lax.optimization_barrier((dz, dc))
    return (dz, dc), dz

  def chunk(carry: Any, given: tuple[Array, Array]) -> tuple[Any, Array]:
    state, others = carry
    state, dz = lax.scan(
      step, state, (others, *given), reverse=True, unroll=True
    )
    return (state, jnp.einsum("klbj,lij->klbi", dz[:, 1:], up)), dz

  start = (layers - 1) * size
  last = _padded(slopes, start, chunks * size - start - time)
  last = last.reshape(chunks, size, 1, batch, units)
  zero = jnp.zeros((layers, batch, wide), slopes.dtype)
  others = jnp.zeros((size, layers - 1, batch, units), slopes.dtype)
  _, dz = lax.scan(chunk, ((zero, zero), others), (last, saved), reverse=True)

  # Before a layer begins the states are zero, after its end dz is.
  dz = dz.reshape(chunks * size, layers, batch, wide)
  h = saved[..., :units].reshape(chunks * size, layers, batch, units)
  product = lambda h, dz: jnp.einsum("tlbi,tlbj->lij", h, dz)
  by_biases = jnp.stack(
    [dz[layer * size :, layer].sum((0, 1)) for layer in range(1, layers)]
  )
  return (
    dz[:time, 0],
    product(h[:-1], dz[1:]).astype(kernels.dtype),
    product(h[:-size, :-1], dz[size:, 1:]).astype(between.dtype),
    by_biases.astype(biases.dtype),
  )


stacked_lstm.defvjp(_forward, _backward)
