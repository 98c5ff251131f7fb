"""Convolution, pooling and recurrence that are fast where clients train.

Clients train inside compiled loops and, in lanes, with a kernel each. There
XLA's own convolution is slow: on a CPU it leaves its fast path inside a loop,
and with a kernel per lane it becomes a grouped one everywhere. As matrix
products it is neither. `docs/performance.md` has the measurements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

Array = jax.Array


# --- convolution --------------------------------------------------------------


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
  """An `nnx.Conv` that computes as `convolve` does."""
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


def convolve(
  inputs: Array,
  kernel: Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
  out_sharding: Any = None,
) -> Array:
  """`jax.lax.conv_general_dilated` as matrix products.

  What is asked for beyond a plain convolution, channels last, is left to XLA.

  Args:
    inputs: shape=(batch, *space, features_in).
    kernel: shape=(*window, features_in, features_out).
    window_strides: one a dimension of space.
    padding: "SAME", "VALID", or (before, after) for each dimension of space.
    lhs_dilation: not None nor 1: left to XLA.
    rhs_dilation: not None nor 1: left to XLA.
    dimension_numbers: None: channels last, as above and as `nnx.Conv` has
      them; others are left to XLA.
    feature_group_count: not 1: left to XLA.
    precision: of the products.
    preferred_element_type: not None nor the inputs' dtype: left to XLA.
    out_sharding: not None: left to XLA.

  Returns:
    shape=(batch, *space, features_out).
  """
  last, space = inputs.ndim - 1, range(1, inputs.ndim - 1)
  channels_last = lax.ConvDimensionNumbers(
    lhs_spec=(0, last, *space),
    rhs_spec=(last, last - 1, *range(last - 1)),
    out_spec=(0, last, *space),
  )
  if dimension_numbers is None:
    dimension_numbers = channels_last
  dilations = (*(lhs_dilation or ()), *(rhs_dilation or ()))
  plain = (
    lax.conv_dimension_numbers(inputs.shape, kernel.shape, dimension_numbers)
    == channels_last
    and feature_group_count == 1
    and all(d == 1 for d in dilations)
    and preferred_element_type in (None, inputs.dtype)
    and out_sharding is None
  )
  if not plain:
    return lax.conv_general_dilated(
      inputs,
      kernel,
      window_strides,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      dimension_numbers=dimension_numbers,
      feature_group_count=feature_group_count,
      precision=precision,
      preferred_element_type=preferred_element_type,
      out_sharding=out_sharding,
    )
  window = kernel.shape[:-2]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      inputs.shape[1:-1], window, window_strides, padding
    )
  padded = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
  method = _method(window, window_strides, kernel.shape[-2], padded, kernel)
  return method(padded, kernel, window_strides, precision)


def _method(
  window: Sequence[int],
  strides: Sequence[int],
  features_in: int,
  *operands: Array,
) -> Callable[..., Array]:
  """The faster way: fewer products where products are what costs."""
  small = features_in < 8  # then the sums of `winograd` cost more
  fits = tuple(window) == (3, 3) and all(s == 1 for s in strides)
  on_cpu = jax.default_backend() == "cpu"
  # Its sums and halves lose too many of the few digits of bfloat16, and all
  # fractions of integers.
  precise = all(
    jnp.issubdtype(x.dtype, jnp.inexact) and jnp.finfo(x.dtype).bits >= 32
    for x in operands
  )
  if fits and on_cpu and precise and not small:
    return winograd
  return patches


def patches(
  padded: Array, kernel: Array, strides: Sequence[int], precision: Any = None
) -> Array:
  """Convolution as one product: all shifts of the input, side by side.

  The shifts are kept for the backward pass: as many times the input as the
  window has places, 9 for 3 x 3.

  Args:
    padded: shape=(batch, *space, features_in), already padded.
    kernel: shape=(*window, features_in, features_out).
    strides: one a dimension of space.
    precision: of the product.
  """
  *window, features_in, features_out = kernel.shape
  out = [
    max((n - k) // s + 1, 0)
    for n, k, s in zip(padded.shape[1:-1], window, strides, strict=True)
  ]

  def shifted(offset: tuple[int, ...]) -> Array:
    cuts = (
      slice(first, first + n * s, s)
      for first, n, s in zip(offset, out, strides, strict=True)
    )
    return padded[(slice(None), *cuts)]

  shifts = [shifted(o) for o in itertools.product(*map(range, window))]
  wide = jnp.concatenate(shifts, axis=-1)
  flat = kernel.reshape(math.prod(window) * features_in, features_out)
  return jnp.matmul(wide, flat, precision=precision)


# Winograd's F(2 x 2, 3 x 3): Lavin and Gray 2016 (arXiv 1509.09308), eq. 7.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

Grid = Sequence[Sequence[Array]]


def winograd(
  padded: Array, kernel: Array, strides: Sequence[int], precision: Any = None
) -> Array:
  """A 3 x 3 convolution of stride 1 by 16 products for every 2 x 2 outputs.

  Patches take 36. The price are sums before and after, and rounding errors a
  few times those of the plain sum, which float32 can afford. A tile's 16 places
  are 16 arrays, so that the sums are elementwise and each product is one matrix
  product.

  Args:
    padded: shape=(batch, height, width, features_in), already padded.
    kernel: shape=(3, 3, features_in, features_out).
    strides: (1, 1).
    precision: of the products.
  """
  del strides
  batch, height, width, features = padded.shape
  # Tiles; the last may be odd, and a side below 3 has none.
  tall, wide = max(height - 1, 0) // 2, max(width - 1, 0) // 2
  extra = (2 * tall + 2 - height, 2 * wide + 2 - width)
  padded = jnp.pad(padded, ((0, 0), (0, extra[0]), (0, extra[1]), (0, 0)))

  def tile(i: int, j: int) -> Array:
    rows = slice(i, i + 2 * tall, 2)
    columns = slice(j, j + 2 * wide, 2)
    return padded[:, rows, columns].reshape(-1, features)

  tiles = [[tile(i, j) for j in range(4)] for i in range(4)]
  taps = [[kernel[i, j] for j in range(3)] for i in range(3)]
  products = [
    [jnp.matmul(x, k, precision=precision) for x, k in zip(*row, strict=True)]
    for row in zip(_both(_INPUT, tiles), _both(_KERNEL, taps), strict=True)
  ]
  shape = (batch, tall, wide, kernel.shape[-1])
  outputs = [
    jnp.stack([x.reshape(shape) for x in row], axis=3)
    for row in _both(_OUTPUT, products)
  ]
  whole = jnp.stack(outputs, axis=2).reshape(
    batch, 2 * tall, 2 * wide, kernel.shape[-1]
  )
  return whole[:, : max(height - 2, 0), : max(width - 2, 0)]


def _both(matrix: np.ndarray, grid: Grid) -> list[list[Array]]:
  """`matrix @ grid @ matrix.T`, for a grid of arrays."""
  rows = [
    [_combine(weights, column) for column in zip(*grid, strict=True)]
    for weights in matrix
  ]
  return [[_combine(weights, row) for weights in matrix] for row in rows]


def _combine(weights: np.ndarray, arrays: Sequence[Array]) -> Array:
  """The weighted sum of those arrays whose weight is not 0."""
  terms = [
    x if w == 1 else -x if w == -1 else float(w) * x
    for w, x in zip(weights, arrays, strict=True)
    if w
  ]
  return sum(terms[1:], start=terms[0])


def max_pool(x: Array, size: int = 2) -> Array:
  """Maxima over windows of `size` in every dimension of space.

  XLA's own window has a slow gradient. What does not fill a window is left
  out. Where maxima are equal, their gradient is split among them; XLA and
  PyTorch give all of it to one.

  Args:
    x: shape=(batch, *space, features).
    size: of the window, and its stride.
  """
  for axis in range(1, x.ndim - 1):
    n = x.shape[axis] // size * size
    parts = [
      lax.slice_in_dim(x, min(i, n), n, stride=size, axis=axis)
      for i in range(size)
    ]
    whole = parts[0]
    for part in parts[1:]:
      whole = jnp.maximum(whole, part)
    x = whole
  return x


# --- recurrence ---------------------------------------------------------------


@jax.custom_vjp
def lstm(gates: Array, kernel: Array) -> Array:
  """An LSTM over whole sequences, from a zero state.

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
  """i, f, g, o from tanh(z / 2), but tanh(z) for g."""
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
    """Outputs, shape=(time, batch, units), of (time, batch, features)."""
    return lstm(self.inputs(x), self.recurrent[...])
