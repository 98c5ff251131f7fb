"""Sums of whole numbers with discrete Gaussian noise, to the last bit.

The last bits of floating-point noise tell what it was added to (Mironov 2012,
"On significance of the least significant bits for differential privacy"). Here
a clipped update becomes whole numbers before it is summed, and noise is drawn
as whole numbers, so that the noisy sum is exactly what a proof is about; what
is computed from it later tells nothing more. Canonne, Kamath and Steinke 2020,
arXiv 2004.00010, for a server that is trusted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, Key, PyTree, validate
from fedjax_sim.core.tree import tree_norm
from fedjax_sim.privacy.central import noise
from fedjax_sim.privacy.secure import discrete_gaussian

LEAST_KEPT = 0.99  # of an update's length, by rounding
_MOST = 2**31 - 1  # of a sum
_FINEST = 2**26  # float32 has no more digits


class Grid(NamedTuple):
  """The whole numbers in which contributions are summed.

  Attributes:
    clients: the most that contribute.
    multiplier: the noise's standard deviation over the longest contribution.
    scale: the longest contribution, in steps; a power of 2.
  """

  clients: int
  multiplier: float
  scale: int

  @property
  def stddev(self) -> float:
    """The noise's standard deviation, in steps."""
    return self.multiplier * self.scale

  def unit(self, dimension: int) -> float:
    """Return how many steps the longest update has, before it is rounded.

    Rounding moves a coordinate by half a step at most, and so the update by
    sqrt(dimension) / 2: by so much the unit is less than the scale.

    Args:
      dimension: how many numbers an update has.

    Raises:
      ValueError: that is more than 1 % of the scale.
    """
    unit = self.scale - math.sqrt(dimension) / 2
    if unit < LEAST_KEPT * self.scale:
      raise ValueError(
        f"privacy.mechanism='discrete_gaussian': on the finest grid for"
        f" {self.clients} clients and privacy.noise_multiplier="
        f"{self.multiplier:g} the longest update has {self.scale} steps, and"
        f" rounding its {dimension} numbers may take"
        f" {math.sqrt(dimension) / 2:.0f} of them, more than"
        f" {1 - LEAST_KEPT:.0%}; take less noise, fewer clients a round, a"
        " smaller model, or privacy.mechanism='gaussian'."
      )
    return unit

  def distance(self, dimension: int) -> float:
    """Return how far a round's noise is from the law that accountants count.

    Args:
      dimension: how many numbers an update has.

    Returns:
      A bound of the total variation.

    Raises:
      ValueError: as `unit`.
    """
    self.unit(dimension)
    if self.multiplier == 0:
      return 0.0
    return dimension * discrete_gaussian.distance(self.stddev)

  def fits(self, steps: PyTree) -> Array:
    """Return whether an update's norm is within the scale; shape=(), bool.

    `in_steps` makes sure of it: this is a last look at what is released, in
    case a device computes otherwise than clipping counts on.
    """
    number = jax.tree.map(lambda x: x.astype(jnp.float32), steps)
    return tree_norm(number) <= self.scale

  def noised(self, key: Key, total: PyTree) -> PyTree:
    """Return the sum with noise, int32 as the sum.

    Args:
      key: of this round.
      total: leaves int32, at most `clients` contributions.
    """
    if self.multiplier == 0:
      return total
    return noise.discrete(self.stddev, key, total)

  def in_units(self, total: PyTree) -> PyTree:
    """Return a sum in units of the clipping norm; float32."""
    unit = self.unit(size(total))
    return jax.tree.map(lambda x: x.astype(jnp.float32) / unit, total)

  def shares(self, total: PyTree) -> PyTree:
    """Return a sum in units of the longest contribution; float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / self.scale, total)

  def in_steps(self, update: PyTree) -> PyTree:
    """Return an update rounded to whole steps.

    Args:
      update: float32; its L2 norm is at most 1 (`clip_to_unit_norm`), and that
        of the result at most the scale.

    Returns:
      int32.
    """
    unit = self.unit(size(update))
    return jax.tree.map(lambda x: jnp.round(x * unit).astype(jnp.int32), update)


def grid(clients: int, multiplier: float) -> Grid:
  """Return the finest grid whose sums fit and whose noise can be drawn.

  Args:
    clients: the most that contribute to a round.
    multiplier: as in `Grid`; 0: no noise.

  Raises:
    TypeError, ValueError: an argument is out of range, or no grid fits.
  """
  validate.integer("clients", clients)
  validate.number("privacy.noise_multiplier", multiplier, ge=0)
  scale = _FINEST
  while scale >= 1:
    made = Grid(clients, multiplier, scale)
    if made.stddev <= discrete_gaussian.MOST_STDDEV:
      largest = clients * scale
      if multiplier:
        largest += discrete_gaussian.reach(made.stddev)
      if largest <= _MOST:
        return made
    scale //= 2
  raise ValueError(
    f"privacy.mechanism='discrete_gaussian': a sum of {clients} clients with"
    f" privacy.noise_multiplier={multiplier:g} fits no grid of 32-bit numbers;"
    " take less noise, fewer clients a round, or privacy.mechanism='gaussian'."
  )


def size(tree: PyTree) -> int:
  """Return how many numbers a tree holds."""
  return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))
