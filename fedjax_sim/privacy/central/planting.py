"""Canaries in a private round: planted in the sum, and scored by the noisy sum.

All functions give () for the audit's state where `CentralDPConfig.canaries` is
None.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, Context, HParams, Key, PyTree
from fedjax_sim.privacy.central.contribution import (
  Contribution,
  canary,
  clip_norm,
  shares,
)
from fedjax_sim.privacy.central.settings import CentralDPConfig


def init(
  settings: CentralDPConfig,
  key: Key,
  like: PyTree,
  statistics: PyTree,
  hparams: HParams,
) -> PyTree:
  """Return the audit's state before the first round.

  Args:
    settings: with the canaries.
    key: of all that is random about them.
    like: arrays of an update's shapes.
    statistics: arrays of the shapes of `Report.statistics`.
    hparams: the run's.

  Returns:
    An `AuditState`, or ().
  """
  if settings.canaries is None:
    return ()
  factor = jnp.ones((), jnp.float32)
  return settings.canaries.init(
    key,
    like,
    canary(settings, statistics, hparams, factor),
    clip_norm(hparams, factor),
    settings.order,
  )


def plant(
  settings: CentralDPConfig,
  audit: PyTree,
  total: Contribution,
  factor: Array,
  context: Context,
) -> tuple[Contribution, PyTree]:
  """Add the canaries' contributions of a round to the clients' sum.

  Args:
    settings: with the canaries.
    audit: the audit's state.
    total: the sum of the clients' contributions.
    factor: shape=(), float32; `PrivateState.clip_factor`.
    context: of the round.

  Returns:
    The sum of all, and the audit's state.
  """
  if settings.canaries is None:
    return total, ()
  hparams, grid = context.hparams, settings.grid
  # Canaries' whole numbers stay exact as shares: few have a coordinate.
  start = total
  if grid is not None:
    nothing = jax.tree.map(jnp.zeros_like, total.update)
    start = total._replace(update=shares(settings, nothing))
  everyone, audit = settings.canaries.plant(
    audit,
    context.round,
    start,
    canary(settings, total.statistics, hparams, factor),
    clip_norm(hparams, factor),
    settings.order,
  )
  if grid is not None:
    update = jax.tree.map(
      lambda t, x: t + jnp.round(x * grid.scale).astype(t.dtype),
      total.update,
      everyone.update,
    )
    everyone = everyone._replace(update=update)
  return everyone, audit


def observe(
  settings: CentralDPConfig,
  audit: PyTree,
  clients: Contribution,
  everyone: Contribution,
  noisy: PyTree,
  factor: Array,
  context: Context,
) -> PyTree:
  """Return the audit's state after a round's noisy sum was seen.

  Args:
    settings: with the canaries.
    audit: the audit's state, as `plant` left it.
    clients: the sum of the clients' contributions.
    everyone: the sum of all, as `plant` made it.
    noisy: the update of that sum, with noise; 1 is the longest update.
    factor: as in `plant`.
    context: of the round.
  """
  if settings.canaries is None:
    return ()
  hparams = context.hparams
  return settings.canaries.observe(
    audit,
    context.round,
    (
      shares(settings, clients.update),
      shares(settings, everyone.update),
      noisy,
    ),
    canary(settings, clients.statistics, hparams, factor),
    clip_norm(hparams, factor),
  )
