"""The distributed discrete Gaussian mechanism, and its accounting.

Kairouz, Liu and Steinke 2021, arXiv 2102.06387: every client rounds its
clipped update by chance and adds a little discrete Gaussian noise; secure
aggregation shows the server nothing but the sum, in which the noise is enough.
Without their random rotation, which lets a message have fewer bits: here bits
are enough for any sum, however the coordinates lie.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Array, HParams, Key, PyTree, validate
from fedjax_sim.core.tree import clip_to_unit_norm, tree_norm
from fedjax_sim.privacy import library
from fedjax_sim.privacy.secure import discrete_gaussian
from fedjax_sim.privacy.secure.masking import Code

LEAST_STDDEV = 1.0  # of a client's noise, in steps: sums are Gaussian enough
_REFUSED = math.exp(-0.5)  # the paper's beta: at most so often it rounds anew
_SLACK = 1e-4  # relative; float32's error of a squared norm is less


class Grid(NamedTuple):
  """The whole numbers on which clients add noise.

  Attributes:
    clients: how many make the noise.
    multiplier: standard deviation of all noise, in units of the clipping norm.
    scale: the clipping norm in steps of the grid, a power of 2.
  """

  clients: int
  multiplier: float
  scale: float

  @property
  def stddev(self) -> float:
    """Parameter of one client's noise, in steps."""
    return self.multiplier * self.scale / math.sqrt(self.clients)


def grid(clients: int, multiplier: float, bits: int = 32) -> Grid:
  """Return the finest grid whose noise has a table and whose sums fit.

  clients (scale + reach) <= 2^(bits - 1) - 1, where a client's noise is at most
  `reach`: no sum overflows.

  Args:
    clients: how many make the noise; the most of a round.
    multiplier: as in `Grid`.
    bits: of a number that a client sends, from 2 to 32.

  Raises:
    TypeError, ValueError: an argument is out of range, or no grid fits.
  """
  clients = validate.integer("clients", clients)
  multiplier = validate.number("noise_multiplier", multiplier, gt=0, le=1e6)
  bits = validate.integer("bits", bits, ge=2, le=32)
  for exponent in range(bits - 1, -1, -1):
    made = Grid(clients, multiplier, 2.0**exponent)
    if made.stddev > discrete_gaussian.MOST_TABLE:
      continue
    largest = made.scale + discrete_gaussian.reach(made.stddev)
    if clients * largest > 2 ** (bits - 1) - 1:
      continue
    if made.stddev < LEAST_STDDEV:
      raise ValueError(
        f"bits={bits}: on the finest grid that holds the sum of"
        f" {clients} clients, a client's noise of noise_multiplier="
        f"{multiplier:g} has a standard deviation of {made.stddev:.2g} steps,"
        f" below {LEAST_STDDEV:g}, and protects little; give more bits."
      )
    return made
  raise ValueError(
    f"bits={bits} and noise_multiplier={multiplier:g}: the sum of"
    f" {clients} clients fits no grid; give more bits, or less noise."
  )


def squared_sensitivity(scale: float, dimension: int) -> float:
  """Return the largest squared length of a rounded update, in steps.

  Before it is rounded, the update is `scale` long at most.

  The paper's Theorem 1, with beta = exp(-1/2) and steps of 1, times 1.0001 for
  the device's float32.

  Args:
    scale: the clipping norm in steps.
    dimension: how many numbers an update has.
  """
  by_chance = (
    scale**2
    + dimension / 4
    + math.sqrt(2 * math.log(1 / _REFUSED)) * (scale + math.sqrt(dimension) / 2)
  )
  return min(by_chance, (scale + math.sqrt(dimension)) ** 2) * (1 + _SLACK)


def distributed_gaussian(
  clients: int,
  *,
  clip: float,
  noise_multiplier: float,
  bits: int = 32,
  mean: bool = False,
) -> Code:
  """Return the code of a sum with discrete Gaussian noise of the clients.

  An update longer than `clip` (L2) is scaled down to it; weights count
  nothing. Every coordinate is rounded up or down by chance, all of them anew
  while the result is longer than `squared_sensitivity` allows.

  Args:
    clients: how many make the noise; the most of a round. If fewer arrive there
      is less noise, and `zcdp` has to know.
    clip: the clipping norm.
    noise_multiplier: standard deviation of the sum's noise in units of `clip`,
      if all `clients` arrive. Not traced: tables depend on it.
    bits: of a number that a client sends, from 2 to 32.
    mean: divide the sum by `clients`, whoever arrives.

  Raises:
    TypeError, ValueError: an argument is out of range, or no grid fits.
  """
  made = grid(clients, noise_multiplier, bits)
  discrete_gaussian.thresholds(made.stddev)
  norm = validate.number("clip", clip, gt=0)

  def encode(
    update: PyTree, weight: Array, key: Key, hparams: HParams
  ) -> PyTree:
    del weight
    rounding, noise = jax.random.split(key)
    unit = clip_to_unit_norm(update, hparams["clip"])
    short = tree_norm(unit) <= 1  # else nothing is sent
    unit = jax.tree.map(lambda x: jnp.where(short, x, 0), unit)
    steps = round_by_chance(
      rounding, jax.tree.map(lambda x: x * made.scale, unit), made.scale
    )
    leaves, structure = jax.tree.flatten(steps)
    noisy = [
      x.astype(jnp.int32)
      + discrete_gaussian.sample(
        jax.random.fold_in(noise, i), made.stddev, x.shape
      )
      for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, noisy)

  def decode(sums: PyTree, hparams: HParams) -> PyTree:
    step = hparams["clip"] / (made.scale * (clients if mean else 1))
    return jax.tree.map(lambda x: x.astype(jnp.float32) * step, sums)

  return Code(made.clients, bits, encode, decode, {"clip": norm}, True)


def round_by_chance(key: Key, tree: PyTree, scale: float) -> PyTree:
  """Round to whole numbers by chance, conditional on their length.

  The paper's conditional stochastic rounding: independent coordinates, rounded
  up or down such that the mean is kept, and drawn anew until the squared norm
  is at most `squared_sensitivity`.

  Args:
    key: of the draws.
    tree: float32, of norm <= scale.
    scale: the clipping norm in steps.

  Returns:
    The tree, whole numbers in float32.
  """
  leaves, structure = jax.tree.flatten(tree)
  dimension = sum(x.size for x in leaves)
  # Half of the slack, or errors of float32 could let it draw for ever.
  most = squared_sensitivity(scale, dimension) * (1 - _SLACK / 2)

  def draw(attempt: Array) -> list[Array]:
    keys = jax.random.split(jax.random.fold_in(key, attempt), len(leaves))
    return [
      jnp.floor(x + jax.random.uniform(k, x.shape))
      for k, x in zip(keys, leaves, strict=True)
    ]

  def again(carry: tuple[Array, list[Array]]) -> Array:
    return _squared(carry[1]) > most

  def anew(carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
    return carry[0] + 1, draw(carry[0])

  first = jnp.ones((), jnp.int32), draw(jnp.zeros((), jnp.int32))
  return jax.tree.unflatten(structure, lax.while_loop(again, anew, first)[1])


def _squared(leaves: list[Array]) -> Array:
  return sum((jnp.sum(x**2) for x in leaves), jnp.zeros((), jnp.float32))


def zcdp(
  made: Grid, dimension: int, *, least: int, sensitivity: float = 1.0
) -> float:
  """Return the zero-concentrated divergence rho of one round.

  The paper's Theorem 1: the sum of `least` clients' noise is nearly a discrete
  Gaussian; tau says how nearly. rho = epsilon^2 / 2.

  Args:
    made: the grid.
    dimension: how many numbers an update has.
    least: clients whose noise is certain to be in the sum: without drop-outs
      `made.clients`, else the fewest survivors, less those who may tell the
      server their noise.
    sensitivity: 1 if a client's update may become 0, the noise staying; 2 if
      it may become another's.

  Raises:
    TypeError, ValueError: an argument is out of range.
  """
  dimension = validate.integer("dimension", dimension)
  least = validate.integer("least", least, le=made.clients)
  sensitivity = validate.number("sensitivity", sensitivity, gt=0)
  squared = squared_sensitivity(made.scale, dimension) * sensitivity**2
  ratio = squared / (least * made.stddev**2)
  tau = _tau(made.stddev, least)
  epsilon = min(
    math.sqrt(ratio + tau * dimension / 2),
    math.sqrt(ratio) + tau * math.sqrt(dimension),
  )
  return epsilon**2 / 2


def sentence(made: Grid, dimension: int, dropout: bool) -> str:
  """Return what one round's noise guarantees, in words, no full stop.

  Args:
    made: the grid.
    dimension: how many numbers an update has.
    dropout: whether clients may drop out, and their noise with them.
  """
  rho = zcdp(made, dimension, least=made.clients)
  told = (
    f"rho {rho:.3g} for a round's sum of updates if all {made.clients} clients"
    " add their noise; no epsilon of the run is counted"
  )
  if dropout:
    told += "; who drops out takes noise along"
  return told


def _tau(stddev: float, clients: int) -> float:
  """Return 10 sum over k < clients of exp(-2 pi^2 stddev^2 k / (k + 1))."""
  rate = 2 * math.pi**2 * stddev**2
  return 10 * math.fsum(
    math.exp(-rate * k / (k + 1)) for k in range(1, clients)
  )


def epsilon(rho: float, delta: float, rounds: int = 1) -> float:
  """Return the epsilon of so many rounds, not amplified by sampling.

  Converted by dp-accounting from zero-concentrated to Renyi differential
  privacy and on; that the device's draws are not exact adds at most
  rounds x clients x dimension x (1 + e^epsilon) times the distance that
  `discrete_gaussian.sample` states to delta.

  Args:
    rho: of one round.
    delta: above 0 and below 1.
    rounds: how many.

  Raises:
    TypeError, ValueError: an argument is out of range.
    ImportError: dp-accounting is missing.
  """
  rho = validate.number("rho", rho, ge=0)
  delta = validate.number("delta", delta, gt=0, lt=1)
  rounds = validate.integer("rounds", rounds)
  event = library("dp_accounting").ZCDpEvent(rho=rho)
  accountant = library("dp_accounting.rdp").RdpAccountant()
  accountant.compose(event, rounds)
  return float(accountant.get_epsilon(delta))
