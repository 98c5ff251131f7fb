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
  """The largest of every window, NaN where one is.

  As in XLA, of equal ones the first, row by row, has all of the gradient.

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
  """The smallest of every window; else as `maximum`."""

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
  """The sum of every window, in float32 at least; else as `maximum`."""
  dtype = x.dtype
  if jnp.issubdtype(dtype, jnp.floating):
    x = x.astype(jnp.promote_types(dtype, jnp.float32))
  sums = _windows(jnp.add, 0, x, window, strides, padding, dilation)
  return sums.astype(dtype)


def _bounds(x: Array) -> tuple[float, float]:
  """What is below, and what is above, all that the dtype has."""
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
  """All places of a window joined, from the last dimension to the first.

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
