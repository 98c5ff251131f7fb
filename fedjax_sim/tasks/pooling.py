"""Pooling that is fast where clients train: shifted slices, axis by axis.

XLA's own windows have a slow gradient on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
MOST_AT_ONCE = 9  # places of a window
Padding = Sequence[tuple[int, int]]


def maximum(
  x: Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: Padding | None = None,
  dilation: Sequence[int] | None = None,
) -> Array:
  """Return the largest number of every window, NaN if it holds a NaN.

  As in XLA, the first of equal numbers, row by row, gets all of the gradient.

  Args:
    x: any shape.
    window: one a dimension, as all that follow.
    strides: of the window.
    padding: (before, after) each dimension, never chosen; None: none.
    dilation: of the window; None: 1.
  """

  def larger(a: Array, b: Array) -> Array:
    return jnp.where((a >= b) | (a != a), a, b)

  lowest = _bounds(x)[0]
  return _windows(larger, lowest, x, window, strides, padding, dilation)


def minimum(
  x: Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: Padding | None = None,
  dilation: Sequence[int] | None = None,
) -> Array:
  """Return the smallest number of every window; see `maximum`."""

  def smaller(a: Array, b: Array) -> Array:
    return jnp.where((a <= b) | (a != a), a, b)

  highest = _bounds(x)[1]
  return _windows(smaller, highest, x, window, strides, padding, dilation)


def total(
  x: Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: Padding | None = None,
  dilation: Sequence[int] | None = None,
) -> Array:
  """Return each window's sum, computed in float32 at least; see `maximum`."""
  dtype = x.dtype
  if jnp.issubdtype(dtype, jnp.floating):
    x = x.astype(jnp.promote_types(dtype, jnp.float32))
  sums = _windows(jnp.add, 0, x, window, strides, padding, dilation)
  return sums.astype(dtype)


def _bounds(x: Array) -> tuple[float, float]:
  """Return a lower and an upper bound of all numbers of x's dtype."""
  if jnp.issubdtype(x.dtype, jnp.integer):
    limits = jnp.iinfo(x.dtype)
    return limits.min, limits.max
  return -math.inf, math.inf


def _windows(
  join: Callable[[Array, Array], Array],
  fill: float,
  x: Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: Padding | None,
  dilation: Sequence[int] | None,
) -> Array:
  """Join all places of a window, from the last dimension to the first.

  So of equal maxima the first along rows, and then the first row, is kept.
  Off the CPU small windows are joined place by place, in the same order: that
  is one kernel, which stores nothing between the dimensions.
  """
  padding = padding or [(0, 0)] * x.ndim
  dilation = dilation or (1,) * x.ndim
  sides = [(*pads, 0) for pads in padding]
  x = lax.pad(x, jnp.asarray(fill, x.dtype), sides)
  counts = [
    max((n - (size - 1) * gap - 1) // stride + 1, 0)
    for n, size, gap, stride in zip(
      x.shape, window, dilation, strides, strict=True
    )
  ]

  def cut(axis: int, place: int) -> slice:
    first, stride = place * dilation[axis], strides[axis]
    return slice(first, first + counts[axis] * stride, stride)

  if jax.default_backend() != "cpu" and math.prod(window) <= MOST_AT_ONCE:

    def joined(*cuts: slice) -> Array:
      axis = len(cuts)
      if axis == x.ndim:
        return x[cuts]
      return functools.reduce(
        join, [joined(*cuts, cut(axis, i)) for i in range(window[axis])]
      )

    return joined()
  for axis in reversed(range(x.ndim)):
    before = (slice(None),) * axis
    x = functools.reduce(
      join, [x[(*before, cut(axis, i))] for i in range(window[axis])]
    )
  return x
