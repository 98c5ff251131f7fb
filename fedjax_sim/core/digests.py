"""SHA-256 digests of arrays and trees."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from fedjax_sim.core.types import PyTree


def digest(leaf: np.ndarray) -> str:
  """Return the SHA-256 of an array's dtype, shape and bytes."""
  total = hashlib.sha256(f"{leaf.dtype.name}{leaf.shape}".encode())
  total.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def tree_digest(tree: PyTree) -> str:
  """Return the SHA-256 over all leaves of the tree, in order."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    total.update(digest(np.asarray(leaf)).encode())
  return total.hexdigest()
