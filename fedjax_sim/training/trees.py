"""Trees of a fixed shape: where examples go, and where nodes are split.

A complete tree of depth d has 2^d - 1 splits, level by level, and 2^d leaves.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array


def descended(
  x: Array, features: Array, thresholds: Array, levels: int | Array
) -> Array:
  """Return where examples are in a tree, from the left of the level.

  Args:
    x: shape=(batch, features).
    features: shape=(splits,); what splits look at, level by level.
    thresholds: shape=(splits,).
    levels: how many levels to go down; traced, where it is an array.

  Returns:
    shape=(batch,), int32, below 2^levels.
  """
  columns = features.astype(jnp.int32)

  def down(level: Array, place: Array) -> Array:
    node = 2**level - 1 + place
    own = jnp.take_along_axis(x, columns[node][:, None], axis=1)[:, 0]
    return 2 * place + (own >= thresholds[node]).astype(jnp.int32)

  start = jnp.zeros(x.shape[0], jnp.int32)
  return jax.lax.fori_loop(0, levels, down, start)


class Splits(NamedTuple):
  """The best split of every node.

  Attributes:
    some: shape=(nodes,), bool; whether splitting gains anything.
    feature: shape=(nodes,), int32.
    cell: shape=(nodes,), int32; the last cell on the left.
    left: shape=(nodes, 2); sums of derivatives on the left, all without a
      split.
    right: shape=(nodes, 2); those on the right.
  """

  some: Array
  feature: Array
  cell: Array
  left: Array
  right: Array


def best_splits(
  histogram: Array, l2: Array, min_gain: Array, min_child_weight: Array
) -> Splits:
  """Return the split of each node that gains most, as XGBoost does.

  Chen and Guestrin 2016, "XGBoost: a scalable tree boosting system", arXiv
  1603.02754, equation 7.

  Args:
    histogram: shape=(nodes, features, cells, 2); sums of first and second
      derivatives; with noise, of any sign.
    l2: shape=(); added to sums of second derivatives.
    min_gain: shape=(); what a split must gain.
    min_child_weight: shape=(); least sum of second derivatives on a side.
  """
  nodes, _, cells, _ = histogram.shape
  left = jnp.cumsum(histogram, axis=2)
  total = left[:, :, -1:]
  right = total - left

  def score(sums: Array) -> Array:
    below = sums[..., 1] + l2
    return jnp.where(below > 0, sums[..., 0] ** 2, 0) / jnp.where(
      below > 0, below, 1
    )

  gain = (score(left) + score(right) - score(total)) / 2 - min_gain
  lightest = jnp.minimum(left[..., 1], right[..., 1])
  allowed = (lightest >= min_child_weight) & (lightest > 0)
  allowed &= (jnp.arange(cells) < cells - 1)[None, None]
  gain = jnp.where(allowed, gain, -1).reshape(nodes, -1)
  best = jnp.argmax(gain, axis=1)
  some = jnp.max(gain, axis=1) > 0
  flat = left.reshape(nodes, -1, 2)
  chosen = jnp.take_along_axis(flat, best[:, None, None], axis=1)[:, 0]
  # Totals of all features are alike, but for noise.
  whole = jnp.mean(total[:, :, 0], axis=1)
  own = jnp.take_along_axis(total[:, :, 0], (best // cells)[:, None, None], 1)
  return Splits(
    some=some,
    feature=jnp.where(some, best // cells, 0).astype(jnp.int32),
    cell=jnp.where(some, best % cells, cells - 1).astype(jnp.int32),
    left=jnp.where(some[:, None], chosen, whole),
    right=jnp.where(some[:, None], own[:, 0] - chosen, 0),
  )
