"""Pooling that is fast where clients train: shifted slices, axis by axis.

XLA's own windows have a slow gradient on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
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
  """
  padding = padding or [(0, 0)] * x.ndim
  dilation = dilation or (1,) * x.ndim
  sides = [(*pads, 0) for pads in padding]
  x = lax.pad(x, jnp.asarray(fill, x.dtype), sides)
  for axis in reversed(range(x.ndim)):
    size, stride, gap = window[axis], strides[axis], dilation[axis]
    count = max((x.shape[axis] - (size - 1) * gap - 1) // stride + 1, 0)
    parts = []
    for place in range(size):
      cut = [slice(None)] * x.ndim
      cut[axis] = slice(place * gap, place * gap + count * stride, stride)
      parts.append(x[tuple(cut)])
    x = parts[0]
    for part in parts[1:]:
      x = join(x, part)
  return x
