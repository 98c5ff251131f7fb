"""Gradient checkpointing, a block at a time.

Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv
1604.06174): of every block only the input is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx


def applied(block: Any, remat: bool, *args: Any) -> jax.Array:
  """Return `block(*args)`.

  Args:
    block: an nnx module.
    remat: whether the backward pass computes what is inside anew.
    *args: arrays.
  """
  call = lambda module, *given: module(*given)
  result: jax.Array = (nnx.remat(call) if remat else call)(block, *args)
  return result
