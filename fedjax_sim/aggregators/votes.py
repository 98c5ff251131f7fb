"""Majority votes over the signs of updates.

Bernstein et al. 2018, "signSGD: Compressed optimisation for non-convex
problems" (arXiv 1802.04434), algorithm 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import Aggregator, Array, PyTree
from fedjax_sim.core.tree import add_weighted, zeros_accumulator


def majority_vote() -> Aggregator:
  """Return the sign of the sum of clients' signs, entry by entry.

  Every client has one vote, whatever its weight; an entry of 0 abstains, and a
  tie is 0. With the transform `signsgd` each vote is one bit.
  """

  def add(acc: PyTree, updates: PyTree, present: Array) -> PyTree:
    signs = jax.tree.map(jnp.sign, updates)
    return add_weighted(acc, signs, jnp.ones(present.shape), present)

  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=lambda acc, u, w, present, context: add(acc, u, present),
    finish=lambda acc, weight, count, context: jax.tree.map(jnp.sign, acc),
    differentiable=False,
  )
