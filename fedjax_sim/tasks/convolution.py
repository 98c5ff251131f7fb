"""Convolution that is fast where clients train.

Clients train inside compiled loops and, in lanes, with a kernel each. There
XLA's own convolution is slow: on a CPU it leaves its fast path inside a loop,
and with a kernel per lane it becomes a grouped one everywhere. As matrix
products it is neither. `docs/performance.md` has the measurements.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

MOST_PLACES = 128  # of a window; each is a copy of the input
# Of the products' inputs, in bytes; a step takes 2 or 3 times as much. They are
# low, since lanes multiply them and a traced call does not see lanes.
MOST_BYTES = 2**28  # of one example; off the CPU, of what is computed at once
WHOLE_BYTES = 2**25  # of a batch that is computed at once on a CPU
PIECE_BYTES = 2**23  # of each part of another one: small ones stay in caches
# Off the CPU: where an example has so many times more places than features in
# the output, the kernel's gradient is small beside what it is computed from.
FEW_FEATURES = 16


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
  batch_group_count: int = 1,
) -> Array:
  """Compute `jax.lax.conv_general_dilated` by matrix products.

  A batch whose patches would take more than `WHOLE_BYTES` (`MOST_BYTES` off the
  CPU) is computed in equal parts, one after the other, and the backward pass
  computes their patches anew. XLA itself computes windows of more than
  `MOST_PLACES` places, examples of more than `MOST_BYTES`, groups of the batch,
  outputs of a given sharding, and symbolic shapes.

  Args:
    inputs: shape=(batch, *space, features_in), unless `dimension_numbers` says
      otherwise.
    kernel: shape=(*window, features_in / groups, features_out), likewise.
    window_strides: one a dimension of space.
    padding: "SAME", "VALID", or (before, after) for each dimension of space.
    lhs_dilation: of the inputs, one a dimension of space; None: 1.
    rhs_dilation: of the window, likewise.
    dimension_numbers: as in JAX; None: channels last, as `nnx.Conv` has them.
    feature_group_count: groups of the features.
    precision: of the products.
    preferred_element_type: the outputs' dtype; None: as the inputs.
    out_sharding: not None: left to XLA.
    batch_group_count: not 1: left to XLA.

  Returns:
    shape=(batch, *space, features_out), unless `dimension_numbers` says
    otherwise.
  """
  last, space = inputs.ndim - 1, range(1, inputs.ndim - 1)
  if dimension_numbers is None:
    dimension_numbers = lax.ConvDimensionNumbers(
      lhs_spec=(0, last, *space),
      rhs_spec=(last, last - 1, *range(last - 1)),
      out_spec=(0, last, *space),
    )
  of_inputs, of_kernel, of_outputs = lax.conv_dimension_numbers(
    inputs.shape, kernel.shape, dimension_numbers
  )
  window = [kernel.shape[i] for i in of_kernel[2:]]
  of_xla = functools.partial(
    lax.conv_general_dilated,
    inputs,
    kernel,
    window_strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    batch_group_count=batch_group_count,
    precision=precision,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  if (
    math.prod(window) > MOST_PLACES
    or batch_group_count != 1
    or out_sharding is not None
    or not all(isinstance(size, int) for size in inputs.shape)
  ):
    return of_xla()
  inputs = jnp.transpose(inputs, _channels_last(of_inputs))
  kernel = jnp.transpose(kernel, (*of_kernel[2:], of_kernel[1], of_kernel[0]))
  dilation = tuple(rhs_dilation or (1,) * len(window))
  if isinstance(padding, str):
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    padding = lax.padtype_to_pads(
      inputs.shape[1:-1], spans, window_strides, padding
    )
  gaps = [d - 1 for d in lhs_dilation or (1,) * len(window)]
  sides = [(*pads, gap) for pads, gap in zip(padding, gaps, strict=True)]
  zero = jnp.zeros((), inputs.dtype)
  padded = lax.pad(inputs, zero, [(0, 0, 0), *sides, (0, 0, 0)])
  options = {
    "strides": tuple(window_strides),
    "dilation": dilation,
    "precision": precision,
    "preferred_element_type": preferred_element_type,
  }
  method = functools.partial(patches, **options)
  copies = math.prod(window)
  if _suits_winograd(kernel, inputs.dtype, **options):
    method = functools.partial(winograd, **options)
    copies = 4  # 16 places for every 4 outputs
  out = _outputs(padded, window, window_strides, dilation)
  size = math.prod(out) * copies * padded.shape[-1] * padded.dtype.itemsize
  if size > MOST_BYTES:
    return of_xla()
  outputs = _in_pieces(
    lambda x, k: _grouped(method, x, k, feature_group_count),
    padded,
    kernel,
    size,
  )
  places = _channels_last(of_outputs)
  return jnp.transpose(outputs, [places.index(i) for i in range(last + 1)])


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
  """Return the axes (batch, *space, features) of (batch, features, *space)."""
  return (spec[0], *spec[2:], spec[1])


def _outputs(
  padded: Array,
  window: Sequence[int],
  strides: Sequence[int],
  dilation: Sequence[int],
) -> list[int]:
  """Return the outputs' shape in space."""
  spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
  return [
    max((n - k) // s + 1, 0)
    for n, k, s in zip(padded.shape[1:-1], spans, strides, strict=True)
  ]


def _in_pieces(
  method: Callable[[Array, Array], Array],
  padded: Array,
  kernel: Array,
  size: int,
) -> Array:
  """Apply a method to equal parts of the batch, one after the other.

  Args:
    method: (part of the batch, kernel) -> the part's outputs.
    padded: shape=(batch, ...).
    kernel: shared by all parts.
    size: bytes of one example's patches.
  """
  batch = len(padded)
  whole, piece = MOST_BYTES, MOST_BYTES
  if jax.default_backend() == "cpu":
    whole, piece = WHOLE_BYTES, PIECE_BYTES
  if batch * size <= whole:
    return method(padded, kernel)
  pieces = math.ceil(batch / max(piece // size, 1))
  each = math.ceil(batch / pieces)
  filled = [(0, pieces * each - batch)] + [(0, 0)] * (padded.ndim - 1)
  parts = jnp.pad(padded, filled).reshape(pieces, each, *padded.shape[1:])
  # The kernel's gradient is a sum over the parts, in the dtype outside.
  dtype, wide = kernel.dtype, kernel
  if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32:
    wide = kernel.astype(jnp.float32)
  # Else each part's patches were kept for the backward pass.
  part = jax.checkpoint(lambda x: method(x, wide.astype(dtype)))
  outputs = lax.map(part, parts)
  return outputs.reshape(-1, *outputs.shape[2:])[:batch]


def _grouped(
  method: Callable[[Array, Array], Array],
  padded: Array,
  kernel: Array,
  groups: int,
) -> Array:
  """Apply a method to each group of features by itself, by `vmap`."""
  if groups == 1:
    return method(padded, kernel)
  cut = lambda x: x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
  outputs = jax.vmap(method, in_axes=(-2, -2), out_axes=-2)(
    cut(padded), cut(kernel)
  )
  return outputs.reshape(*outputs.shape[:-2], kernel.shape[-1])


def _suits_winograd(
  kernel: Array,
  dtype: Any,
  *,
  strides: tuple[int, ...],
  dilation: tuple[int, ...],
  precision: Any,
  preferred_element_type: Any,
) -> bool:
  """Return whether `winograd` can replace `patches` and is faster."""
  del precision
  *window, features_in, _ = kernel.shape
  small = features_in < 8  # then its sums cost more
  fits = window == [3, 3] and set(strides + dilation) == {1}
  on_cpu = jax.default_backend() == "cpu"
  # Its sums and halves lose too many of the few digits of bfloat16, and all
  # fractions of integers.
  precise = all(
    jnp.issubdtype(x, jnp.inexact) and jnp.finfo(x).bits >= 32
    for x in (dtype, kernel.dtype, preferred_element_type or dtype)
  )
  return fits and on_cpu and precise and not small


def patches(
  padded: Array,
  kernel: Array,
  strides: Sequence[int],
  dilation: Sequence[int] | None = None,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> Array:
  """Convolve by one product: all shifts of the input, side by side.

  The shifts are kept for the backward pass: as many times the input as the
  window has places, 9 for 3 x 3.

  Args:
    padded: shape=(batch, *space, features_in), already padded.
    kernel: shape=(*window, features_in, features_out).
    strides: one a dimension of space.
    dilation: of the window, one a dimension of space; None: 1.
    precision: of the product.
    preferred_element_type: of the product; None: as the inputs.
  """
  *window, features_in, features_out = kernel.shape
  dilation = dilation or (1,) * len(window)
  out = _outputs(padded, window, strides, dilation)

  def shifted(place: tuple[int, ...]) -> Array:
    cuts = (
      slice(i * d, i * d + n * s, s)
      for i, d, n, s in zip(place, dilation, out, strides, strict=True)
    )
    return padded[(slice(None), *cuts)]

  shifts = [shifted(place) for place in itertools.product(*map(range, window))]
  wide = jnp.concatenate(shifts, axis=-1)
  if len(shifts) == 1 and jax.default_backend() != "cpu":
    # XLA for GPUs (jaxlib 0.10.2) would take the slice into the product, where
    # one that strides along two axes fails a check, which ends the process.
    wide = lax.optimization_barrier(wide)
  flat = kernel.reshape(math.prod(window) * features_in, features_out)
  product = functools.partial(
    jnp.matmul,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  if jax.default_backend() == "cpu":
    return product(wide, flat)
  rows = wide.reshape(len(wide), math.prod(out), len(flat))
  return _by_rows(product, rows, flat).reshape(*wide.shape[:-1], features_out)


Product = Callable[[Array, Array], Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_rows(product: Product, rows: Array, flat: Array) -> Array:
  """Return the product of the rows of all examples and a kernel.

  Off the CPU. As one matrix the rows need not be transposed for the kernel's
  gradient. That is a long sum for few numbers, which XLA for GPUs divides into
  parts, and pads the rows so that they are equally long. Where an example's
  part is small enough (`FEW_FEATURES`), examples are the parts instead.

  Args:
    product: of two matrices, or of two stacks of them.
    rows: shape=(batch, places, inputs).
    flat: shape=(inputs, outputs).

  Returns:
    shape=(batch, places, outputs).
  """
  batch, places, inputs = rows.shape
  outputs = product(rows.reshape(batch * places, inputs), flat)
  return outputs.reshape(batch, places, flat.shape[1])


@_by_rows.defjvp
def _by_rows_jvp(
  product: Product, given: tuple[Array, Array], changes: tuple[Array, Array]
) -> tuple[Array, Array]:
  """Return the product, and its change; the gradient is the transpose."""
  (rows, flat), (by_rows, by_kernel) = given, changes
  outputs = _by_rows(product, rows, flat)
  change = _by_rows(product, by_rows, flat)
  if rows.shape[1] < FEW_FEATURES * flat.shape[1]:
    return outputs, change + _by_rows(product, rows, by_kernel)
  # Backwards this sums over the examples, which bfloat16 is too short for.
  wide = by_kernel.astype(jnp.promote_types(flat.dtype, jnp.float32))
  each = jnp.broadcast_to(wide[None], (len(rows), *flat.shape))
  return outputs, change + product(rows, each.astype(flat.dtype))


# Winograd's F(2 x 2, 3 x 3): Lavin and Gray 2016 (arXiv 1509.09308), eq. 7.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

Grid = Sequence[Sequence[Array]]


def winograd(
  padded: Array,
  kernel: Array,
  strides: Sequence[int],
  dilation: Sequence[int] | None = None,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> Array:
  """Convolve by 3 x 3, stride 1, with 16 products for every 2 x 2 outputs.

  `patches` takes 36. The price is sums before and after, and rounding errors a
  few times those of the plain sum, which float32 can afford. A tile's 16 places
  are 16 arrays, so that the sums are elementwise and each product is one matrix
  product.

  Args:
    padded: shape=(batch, height, width, features_in), already padded.
    kernel: shape=(3, 3, features_in, features_out).
    strides: (1, 1).
    dilation: (1, 1), or None.
    precision: of the products.
    preferred_element_type: of the products; None: as the inputs.
  """
  del strides, dilation
  product = functools.partial(
    jnp.matmul,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
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
    [product(x, k) for x, k in zip(*row, strict=True)]
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
  """Return `matrix @ grid @ matrix.T`, for a grid of arrays."""
  rows = [
    [_combine(weights, column) for column in zip(*grid, strict=True)]
    for weights in matrix
  ]
  return [[_combine(weights, row) for weights in matrix] for row in rows]


def _combine(weights: np.ndarray, arrays: Sequence[Array]) -> Array:
  """Return the weighted sum of those arrays whose weight is not 0."""
  terms = [
    x if w == 1 else -x if w == -1 else float(w) * x
    for w, x in zip(weights, arrays, strict=True)
    if w
  ]
  return sum(terms[1:], start=terms[0])
