"""Min-Max and Min-Sum: as far from the mean as no aggregator can tell.

Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine: optimizing model
poisoning attacks and defenses for federated learning" (NDSS). With honest
updates x_i and their mean x, attackers send x + gamma p, with p of one of three
directions and the largest gamma for which

    Min-Max: max_i ||x + gamma p - x_i|| <= max_ij ||x_i - x_j||
    Min-Sum: sum_i ||x + gamma p - x_i||^2 <= max_i sum_j ||x_i - x_j||^2

The paper finds gamma by halving steps. Both sides are quadratic in it, so here
it is the root, which halving would come near.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators import rows
from fedjax_sim.attacks.attack import Attack, Honest
from fedjax_sim.attacks.collusion import (
  deviations,
  directions,
  norm,
  plus,
  scaled,
)
from fedjax_sim.core import Array, HParams, PyTree, validate

PERTURBATIONS = ("unit", "std", "sign")


def min_max(perturbation: str = "std") -> Attack:
  """Send an update no further from any honest one than these are apart.

  Args:
    perturbation: the direction: "unit", against the mean; "std", against each
      coordinate's standard deviation; "sign", against the mean's signs.

  Raises:
    ValueError: no such direction.
  """
  return _attack(perturbation, farthest)


def min_sum(perturbation: str = "std") -> Attack:
  """Send an update whose squared distances sum to no more than an honest one's.

  Args:
    perturbation: the direction: "unit", against the mean; "std", against each
      coordinate's standard deviation; "sign", against the mean's signs.

  Raises:
    ValueError: no such direction.
  """
  return _attack(perturbation, farthest_by_sum)


def _attack(
  perturbation: str, length: Callable[[Honest, PyTree], Array]
) -> Attack:
  """Return the attack that goes a length in a direction, by name."""
  validate.one_of("perturbation", perturbation, PERTURBATIONS)

  def collude(honest: Honest, hparams: HParams) -> PyTree:
    del hparams
    direction = unit(directions(honest)[perturbation], honest)
    return plus(honest.mean, scaled(direction, length(honest, direction)))

  return Attack(collude=collude, by_shares=True)


def unit(direction: PyTree, honest: Honest) -> PyTree:
  """Return a direction at length 1; 0 where it has none."""
  length = norm(direction, honest)
  return scaled(direction, jnp.where(length > 0, 1 / length, 0))


def farthest(honest: Honest, direction: PyTree) -> Array:
  """Return Min-Max's gamma, shape=(), for a direction of length 1.

  ||x + gamma p - x_i||^2 = gamma^2 - 2 gamma <p, x_i - x> + ||x_i - x||^2.
  """
  apart, largest = _near_one(honest)
  gram = rows.gram(apart, honest.shares)
  among = honest.present[:, None] & honest.present[None]
  square = jnp.diagonal(gram)
  pairs = square[:, None] + square[None] - 2 * gram
  bound = jnp.max(jnp.where(among, pairs, 0), initial=0)
  along = _inner(apart, direction, honest)
  roots = along + jnp.sqrt(jnp.maximum(along**2 + bound - square, 0))
  return largest * jnp.min(jnp.where(honest.present, roots, jnp.inf))


def farthest_by_sum(honest: Honest, direction: PyTree) -> Array:
  """Return Min-Sum's gamma, shape=(), for a direction of length 1.

  As deviations from the mean sum to 0, the left side is n gamma^2 + sum_i
  ||x_i - x||^2, and the right one the same with the longest deviation for
  gamma.
  """
  del direction
  return jnp.max(rows.norms(deviations(honest), honest.shares))


def _near_one(honest: Honest) -> tuple[PyTree, Array]:
  """Return the honest deviations over the longest one's norm, and this."""
  apart = deviations(honest)
  largest = jnp.max(rows.norms(apart, honest.shares))
  inverse = jnp.where(largest > 0, 1 / largest, 0)
  return scaled(apart, inverse), largest


def _inner(apart: PyTree, direction: PyTree, honest: Honest) -> Array:
  """Return the inner product of each row with a direction, shape=(slots,)."""
  shares, total = honest.shares, jnp.zeros((), jnp.float32)
  for s, d in zip(
    jax.tree.leaves(apart), jax.tree.leaves(direction), strict=True
  ):
    product = jnp.sum(s.reshape(len(s), -1) * d.reshape(1, -1), axis=1)
    total += shares.part(product) if s.ndim == 1 else product
  return shares.sum(total)
