"""Programs whose operations are too small to be divided among cores.

XLA divides an operation of a CPU device among all cores by the size of its
operands: reading a batch counts as if it read all examples. A core does that in
some microseconds; waking the others takes as long, and together they work twice
as much. Where nothing that a client computes is large, one core does each
operation alone, and the others are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import dtypes
from jax.extend.core import ClosedJaxpr, Jaxpr

# Of XLA: without its pass that divides operations.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}

# Bytes that a core moves in the time in which another one begins to help.
MOST_OF_CLIENTS = 2**16
MOST_OF_ROUNDS = 2**20  # of operations that a round does once

_LOOPS = ("while", "scan")


def is_small(program: Any, clients: int = 2) -> bool:
  """Return whether rounds compute no array that is worth many cores.

  Args:
    program: their jaxpr.
    clients: depth of the loop over clients; that over rounds is around it.
  """
  return all(
    size <= (MOST_OF_CLIENTS if depth >= clients else MOST_OF_ROUNDS)
    for depth, size in _sizes(program, 0)
  )


def _sizes(part: Any, depth: int) -> Iterator[tuple[int, int]]:
  """Yield (depth, bytes) of every array that is computed in loops."""
  if isinstance(part, ClosedJaxpr):
    part = part.jaxpr
  if isinstance(part, tuple | list):
    for each in part:
      yield from _sizes(each, depth)
  if not isinstance(part, Jaxpr):
    return
  for equation in part.eqns:
    inner = depth + (equation.primitive.name in _LOOPS)
    if depth:
      yield from ((depth, _nbytes(x.aval)) for x in equation.outvars)
    for value in equation.params.values():
      yield from _sizes(value, inner)


def _nbytes(x: Any) -> int:
  if jnp.issubdtype(x.dtype, dtypes.extended):
    return 0  # a key
  return int(math.prod(x.shape) * x.dtype.itemsize)
