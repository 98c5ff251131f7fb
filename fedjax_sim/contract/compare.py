"""Whether two results agree but for the order in which floats are summed.

Sums of m floats in two orders differ by at most 2 (m - 1) u times the sum of
the magnitudes (u is half the distance from 1 to the next float of the dtype).
A coordinate of a model after a round is such a sum, of a client's local steps,
whose gradients are sums over a batch and, in products of matrices, over
features, and then of clients. Errors of long products are random and grow like
the square root of their length. So results may differ by

    4 u (clients + steps (batch size + sqrt(features)))

times the largest magnitude of an array, or 1 where that is less, as the terms
may be larger than their sum. The factor 4 leaves room for what a server's step
makes of an error. Whole numbers have to be equal.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import PyTree


class Difference(NamedTuple):
  """The first number in which two trees differ.

  Attributes:
    where: its leaf and its index there.
    one: in the first tree.
    other: in the second one.
    allowed: by how much they may differ.
  """

  where: str
  one: str
  other: str
  allowed: float

  def sentence(self, one: str, other: str) -> str:
    """Return what differs, in words.

    Args:
      one: what the first tree is, such as "with 1 lane".
      other: what the second one is.
    """
    rounding = f" (rounding explains {self.allowed:.1g})" * bool(self.allowed)
    return (
      f"{self.where} is {self.one} {one} and {self.other} {other}{rounding}"
    )


def additions(
  clients: int, steps: int, batch_size: int, example_shape: tuple[int, ...]
) -> float:
  """Return how many rounding errors add up in a round; see the module.

  Args:
    clients: of a cohort.
    steps: of the client that has most.
    batch_size: examples of a step.
    example_shape: of one "x".
  """
  features = math.prod(example_shape) or 1
  return clients + steps * (batch_size + math.sqrt(features))


def difference(one: PyTree, other: PyTree, terms: float) -> Difference | None:
  """Return where two trees of arrays first differ; None if they agree.

  Args:
    one: on the host, of the same structure as `other`.
    other: see `one`.
    terms: as `additions`; 0: every bit has to be equal.
  """
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(one),
    jax.tree.leaves(other),
    strict=True,
  )
  for (path, a), b in pairs:
    a, b = np.asarray(a), np.asarray(b)
    allowed = 0.0
    if jnp.issubdtype(a.dtype, jnp.floating):
      unit = float(jnp.finfo(a.dtype).eps) / 2
      a, b = a.astype(np.float64), b.astype(np.float64)
      largest = max(_largest(a), _largest(b), 1.0)
      allowed = 4 * unit * terms * largest
      with np.errstate(invalid="ignore"):  # of infinities
        apart = ~(np.abs(a - b) <= allowed)
      apart &= ~((a == b) | (np.isnan(a) & np.isnan(b)))
    else:
      apart = a != b
    if apart.any():
      index = tuple(int(i) for i in np.argwhere(apart)[0])
      at = f"[{', '.join(map(str, index))}]" if index else ""
      name = jax.tree_util.keystr(path).lstrip(".")
      shown = (_number(a[index]), _number(b[index]))
      return Difference(f"{name}{at}", *shown, allowed)
  return None


def _largest(x: np.ndarray) -> float:
  finite = x[np.isfinite(x)]
  return float(np.abs(finite).max()) if finite.size else 0.0


def _number(x: np.generic) -> str:
  return f"{x:.7g}" if isinstance(x, np.floating) else str(x)
