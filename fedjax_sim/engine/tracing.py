"""Trace a function once, though a program needs its shapes and then its work.

An accumulator has to exist before the loop that fills it, so the shapes of what
a step returns are asked for first, which traces it: a client's training, or a
whole round. Tracing is Python, and takes as long as compiling a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

T = TypeVar("T")


def trace_once(function: Callable[..., T]) -> Callable[..., T]:
  """Return a function whose calls with the same shapes share one trace.

  The program is that of the function itself: its operations are inlined.

  Args:
    function: arrays -> arrays; it may use tracers from around it.
  """
  traced: Callable[..., T] = jax.jit(function, inline=True)
  return traced
