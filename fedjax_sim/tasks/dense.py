"""Dense layers with few outputs, in the form that is fast on a CPU.

XLA computes the gradient of a kernel of 784 x 10 as a product whose rows have
ten numbers. Here its rows have 784: it is the product of the gradient at the
outputs, which have a row for each class, and the inputs, and is transposed
afterwards. Where kernels lie column by column (`engine/layouts.py`), that moves
nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core.tree import is_narrow


def is_dense(x: Any, kernel: Any, dimension_numbers: Any) -> bool:
  """Return whether a product is a dense layer with few outputs.

  Args:
    x: the left array, or its shape and dtype.
    kernel: the right one.
    dimension_numbers: as in `lax.dot_general`.
  """
  (left, right), batches = dimension_numbers
  last = len(x.shape) - 1
  return (
    not any(batches)
    and (*left, *right) == (last, 0)
    and x.dtype == kernel.dtype
    and is_narrow(kernel)
  )


def dense(
  x: jax.Array,
  kernel: jax.Array,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """Return `x @ kernel`, shape=(..., outputs).

  Args:
    x: shape=(..., inputs).
    kernel: shape=(inputs, outputs).
    precision: as in `lax.dot_general`.
    preferred_element_type: likewise.
  """
  if isinstance(precision, tuple):
    precision = precision[::-1]  # of the kernel, and of x
  # Without barriers XLA would put the plain product in its place.
  transposed = lax.optimization_barrier(kernel.T)
  outputs = lax.dot_general(
    transposed,
    x,
    (((1,), (x.ndim - 1,)), ((), ())),
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return jnp.moveaxis(lax.optimization_barrier(outputs), 0, -1)
