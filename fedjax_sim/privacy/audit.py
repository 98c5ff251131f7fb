"""Audits: canaries planted in a run, and the epsilon that they betray.

A canary is a client that a run makes up: its update is a random direction as
long as the clipping norm. A coin decides for the whole run whether it takes
part; if it does, it takes part in rounds as other clients do, and is clipped,
summed and drowned in noise as they are. Afterwards its score, the product of
its direction with all noisy sums, tells something of its coin, and how well it
does is a lower bound of epsilon (Andrew et al. 2023, "One-shot empirical
privacy estimation for federated learning", arXiv 2302.03098; Steinke et al.
2023, "Privacy auditing with one (1) training run", arXiv 2305.08846).

A lower bound above the upper bound that accountants give means that the noise,
the clipping or the account is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_sim import validate
from fedjax_sim.base import Array, Key, PyTree
from fedjax_sim.privacy import library
from fedjax_sim.sampling import Participation


class AuditState(NamedTuple):
  """What canaries leave in a run's state.

  Attributes:
    key: shape=(2,), uint32; of coins, directions and participations.
    scores: shape=(canaries,), float32.
  """

  key: Array
  scores: Array


class Canaries(NamedTuple):
  """Clients that are made up.

  Attributes:
    size: how many; a coin leaves out half of them.
    participation: as the sampler's.
  """

  size: int
  participation: Participation

  def init(self, key: Key) -> AuditState:
    """The state before the first round."""
    validate.whole("privacy.canaries", self.size)
    return AuditState(
      jax.random.key_data(key), jnp.zeros(self.size, jnp.float32)
    )

  def included(self, state: AuditState) -> Array:
    """The coins, shape=(canaries,), bool."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    return jax.random.bernoulli(key, shape=(self.size,))

  def present(self, state: AuditState, round_: Array) -> Array:
    """Who takes part in a round, shape=(canaries,), bool."""
    rate, period = self.participation[:2]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 1)
    drawn = jax.random.bernoulli(
      jax.random.fold_in(key, round_), rate, (self.size,)
    )
    turn = jnp.arange(self.size) % period == round_ % period
    return drawn & turn & self.included(state)

  def plant(
    self,
    state: AuditState,
    round_: Array,
    total: PyTree,
    like: PyTree,
    contribute: Callable[[PyTree], PyTree],
  ) -> PyTree:
    """The sum of contributions, with those of the canaries.

    Args:
      state: as it is.
      round_: shape=(), int32.
      total: the clients' contributions, summed.
      like: an update's shapes.
      contribute: update -> contribution, as a client's is made.
    """
    present = self.present(state, round_)

    def add(i: Array, total: PyTree) -> PyTree:
      one = contribute(_direction(state, i, like))
      return jax.tree.map(
        lambda t, x: t + jnp.where(present[i], x, 0).astype(t.dtype), total, one
      )

    return lax.fori_loop(0, self.size, add, total)

  def observe(self, state: AuditState, noisy: PyTree) -> AuditState:
    """The state after the noisy sum of a round was seen."""

    def product(i: Array) -> Array:
      one = _direction(state, i, noisy)
      parts = jax.tree.map(lambda x, d: jnp.sum(x * d), noisy, one)
      return jax.tree.reduce(jnp.add, parts)

    seen = lax.map(product, jnp.arange(self.size))
    return state._replace(scores=state.scores + seen)


def _direction(state: AuditState, i: Array, like: PyTree) -> PyTree:
  """A canary's direction, of length 1; leaves as `like`, float32."""
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 2)
  key = jax.random.fold_in(key, i)
  leaves, treedef = jax.tree.flatten(like)
  normal = [
    jax.random.normal(jax.random.fold_in(key, k), x.shape)
    for k, x in enumerate(leaves)
  ]
  length = jnp.sqrt(sum(jnp.sum(x**2) for x in normal))
  return jax.tree.unflatten(treedef, [x / length for x in normal])


class Audit(NamedTuple):
  """What the canaries betray; both bounds hold at once with 95 % confidence.

  Attributes:
    canaries: how many there were.
    included: how many of them took part.
    one_run: a lower bound of epsilon, whatever the noise is (arXiv 2305.08846,
      Theorem 5.2).
    gaussian: a closer one, if the scores are Gaussian, as those of many rounds
      or of Gaussian noise nearly are.
  """

  canaries: int
  included: int
  one_run: float
  gaussian: float


def audit(
  scores: Any, included: Any, delta: float, significance: float = 0.05
) -> Audit:
  """Lower bounds of epsilon from the scores of canaries.

  Args:
    scores: shape=(canaries,), float; higher if included.
    included: shape=(canaries,), bool.
    delta: of the (epsilon, delta) that is claimed.
    significance: how often one of the bounds may be wrong.

  Returns:
    Bounds of 0, which hold always, if fewer than two canaries were included, or
    left out.
  """
  scores, included = np.asarray(scores, np.float64), np.asarray(included)
  taken, left = scores[included], scores[~included]
  if min(len(taken), len(left)) < 2:
    return Audit(len(scores), len(taken), one_run=0.0, gaussian=0.0)
  auditor = library("jax_privacy.auditing").CanaryScoreAuditor(taken, left)
  mu = separation(taken, left, significance / 2)
  gaussian = 0.0
  if mu > 0:
    accounting = library("dp_accounting")
    gaussian = float(accounting.get_epsilon_gaussian(1 / mu, delta))
  return Audit(
    canaries=len(scores),
    included=len(taken),
    one_run=float(auditor.epsilon_one_run(significance / 2, delta)),
    gaussian=gaussian,
  )


def separation(
  taken: np.ndarray, left: np.ndarray, significance: float
) -> float:
  """A lower bound of how many deviations two Gaussians are apart.

  The t statistic of two samples of one variance has a noncentral t law, whose
  parameter is the separation over (1/n + 1/m)^(1/2); 0 if it is not above 0.

  Args:
    taken: shape=(n,), float64; the sample with the greater mean.
    left: shape=(m,), float64.
    significance: how often the bound may be wrong.
  """
  n, m = len(taken), len(left)
  spread = math.sqrt(1 / n + 1 / m)
  free = n + m - 2
  pooled = (n - 1) * taken.var(ddof=1) + (m - 1) * left.var(ddof=1)
  gap = taken.mean() - left.mean()
  if pooled == 0:
    return 0.0
  t = gap / (math.sqrt(pooled / free) * spread)
  stats, optimize = library("scipy.stats"), library("scipy.optimize")
  # As the parameter grows, so small a chance of at most t remains.
  beyond = lambda parameter: stats.nct.sf(t, free, parameter) - significance
  if t <= 0 or beyond(0.0) >= 0:
    return 0.0
  found: float = optimize.brentq(beyond, 0.0, t)
  return found * spread
