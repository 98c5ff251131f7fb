"""What a client sends to a private server: clipped parts of its report.

Canaries and clients send by the same code, so that an audit sees a clip that
does not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, HParams, PyTree
from fedjax_sim.core.tree import (
  all_finite,
  clip_to_unit_norm,
  clipped_by_layer,
  fits,
  tree_norm,
)
from fedjax_sim.privacy.central.settings import CentralDPConfig
from fedjax_sim.privacy.central.worst_case import LARGEST


class Contribution(NamedTuple):
  """What a client sends: parts that are at most 1 long; () is not sent.

  Attributes:
    update: the weighted update over the clipping norm; with discrete noise in
      steps of a grid, int32.
    statistics: `Report.statistics` over their norm.
    weight: shape=(), float32; over the largest weight.
    below: shape=(), float32; twice (whether the update was below the clipping
      norm, minus 1/2).
  """

  update: PyTree
  statistics: PyTree
  weight: PyTree
  below: PyTree


class Checked(NamedTuple):
  """A contribution, and what was found out about it.

  Attributes:
    contribution: what is sent.
    below: shape=(), bool; whether the update was below the clipping norm.
    fit: shape=(), bool; whether every part is at most 1 long. Clipping leaves
      none that is longer, but for what is not finite: a last look at what is
      released.
  """

  contribution: Contribution
  below: Array
  fit: Array


def contribute(
  settings: CentralDPConfig,
  update: PyTree,
  statistics: PyTree,
  weight: Array,
  hparams: HParams,
  factor: Array,
) -> Checked:
  """Weigh and clip what a client reports.

  Args:
    settings: what is clipped, and what is sent besides the update.
    update: `Report.update`.
    statistics: `Report.statistics`.
    weight: shape=(); `Report.weight`.
    hparams: the run's, with the mechanism's own under "privacy".
    factor: shape=(), float32; `PrivateState.clip_factor`.
  """
  numbers, order = hparams["privacy"], settings.order
  bound = clip_norm(hparams, factor)
  share = jnp.ones((), jnp.float32)
  if settings.max_weight is not None:
    share = jnp.clip(weight / numbers["max_weight"], 0, 1)
    share = share.astype(jnp.float32)
  update = jax.tree.map(lambda u: share * u, update)
  below = tree_norm(update, order) <= bound
  if "statistics" in settings.extras:
    statistics = clip_to_unit_norm(
      statistics, numbers["statistics_norm"], order
    )
  clip = clipped_by_layer if settings.per_layer else clip_to_unit_norm
  update = clip(update, bound, order)
  grid = settings.grid
  sent = Contribution(
    update=update if grid is None else grid.in_steps(update),
    statistics=statistics,
    weight=share if "weight" in settings.extras else (),
    below=jnp.where(below, 1.0, -1.0) if "below" in settings.extras else (),
  )
  if grid is None:
    fit = jnp.array([fits(part, order) for part in sent]).all()
  else:  # whole numbers cannot be NaN
    fit = all_finite(update) & grid.fits(sent.update)
  return Checked(sent, below, fit)


def canary(
  settings: CentralDPConfig, statistics: PyTree, hparams: HParams, factor: Array
) -> Callable[[PyTree], Contribution]:
  """Return the function that turns a canary's raw update into a contribution.

  Args:
    settings: as in `contribute`.
    statistics: arrays of the shapes of `Report.statistics`; a canary has 0.
    hparams: as in `contribute`.
    factor: as in `contribute`.
  """

  def make(update: PyTree) -> Contribution:
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)
    weight = jnp.asarray(LARGEST, jnp.float32)
    made = contribute(settings, update, nothing, weight, hparams, factor)
    sent = made.contribution
    return sent._replace(update=shares(settings, sent.update))

  return make


def shares(settings: CentralDPConfig, update: PyTree) -> PyTree:
  """Return a sum of updates as canaries see it: 1 is the longest update."""
  grid = settings.grid
  return update if grid is None else grid.shares(update)


def clip_norm(hparams: HParams, factor: Array) -> Array:
  """Return the clipping norm of a round; shape=(), float32."""
  norm: Array = hparams["privacy"]["clip_norm"] * factor
  return norm.astype(jnp.float32)
