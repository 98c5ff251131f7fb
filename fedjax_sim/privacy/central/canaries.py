"""Canaries: made-up clients that are planted in a private run.

A coin decides for the whole run whether a canary takes part; if it does, it
takes part in rounds as other clients do, and its raw update is weighed,
clipped, summed and drowned in noise as theirs are, by the same code. Its score,
the product of its direction with the noisy sums, tells something of its coin;
`audit` says how much (Andrew et al. 2023, "One-shot empirical privacy
estimation for federated learning", arXiv 2302.03098; Steinke et al. 2023,
"Privacy auditing with one (1) training run", arXiv 2305.08846).

No two canaries share a coordinate of the update, so that no one's score depends
on another one's coin, and their noise is independent. They come in `KINDS`:
what a right clip makes equally long, and a broken one does not. One more, the
worst case that gradients find (`worst_case`), takes part in every round in
which its turn comes, and is scored by the rounds in which it was not drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Array, Key, Participation, PyTree, validate
from fedjax_sim.privacy.central.worst_case import (
  LARGEST,
  Worst,
  measured,
  raw,
  split,
  unit,
  worst,
)

KINDS = (
  "exact",  # as long as the clipping norm, but for what is lost in rounding
  "long",  # LONG times as long
  "huge",  # all its coordinates are the largest float32: so long none is
  "spike",  # one coordinate is, and all others are subnormal
)
EXACT = 1 - 1e-4  # so that it is below the norm on every device
LONG = 1e4
SUBNORMAL = 1e-40
HELD = 1e3
_, _LONG, _HUGE, _SPIKE = range(4)
_COINS, _DRAWS, _SIGNS, _WORST = range(4)  # what keys are for

Contribute = Callable[[PyTree], Any]  # raw update -> central's `Contribution`


class Moments(NamedTuple):
  """Moments of scores over rounds, each shape=(canaries + 1,), float32."""

  number: Array
  total: Array
  squares: Array


class AuditState(NamedTuple):
  """What a run's state keeps of canaries; in arrays the worst case is last.

  Attributes:
    key: shape=(2,), uint32; of coins, directions and participations.
    worst: the worst case.
    longest: shape=(), float32; length of the canaries' longest contribution
      so far.
    present: of the rounds in which a canary took part.
    absent: of the others.
  """

  key: Array
  worst: Worst
  longest: Array
  present: Moments
  absent: Moments


class Evidence(NamedTuple):
  """What an audit needs to know of a run.

  Attributes:
    included: shape=(canaries,), bool; the coins.
    present: as in `AuditState`.
    absent: as in `AuditState`.
    longest: as in `AuditState`.
    unit: shape=(), float32; the multiplier of the update's noise, where that of
      the whole release is 1.
  """

  included: Array
  present: Moments
  absent: Moments
  longest: Array
  unit: Array


class Canaries(NamedTuple):
  """Made-up clients, for an audit.

  Attributes:
    size: how many; a coin leaves out half of them.
    participation: as the sampler's.
  """

  size: int
  participation: Participation

  def init(
    self,
    key: Key,
    like: PyTree,
    contribute: Contribute,
    clip_norm: Array,
    order: int = 2,
  ) -> AuditState:
    """Return the state before the first round.

    Args:
      key: of all that is random here.
      like: an update's shapes.
      contribute: raw update -> contribution, as a client's is made.
      clip_norm: shape=().
      order: 1 or 2; of the norm that clipping bounds.

    Raises:
      ValueError: there are more canaries than parameters.
    """
    validate.integer("privacy.canaries", self.size)
    dimension = _dimension(like)
    if self.size > dimension:
      raise ValueError(
        f"privacy.canaries={self.size}: each needs a parameter of its own, and"
        f" the model has {dimension}; plant at most those."
      )
    found = worst(
      jax.random.fold_in(key, _WORST),
      like,
      lambda update: contribute(update).update,
      clip_norm,
      order,
    )
    zeros = jnp.zeros(self.size + 1, jnp.float32)
    none = Moments(zeros, zeros, zeros)
    return AuditState(
      key=jax.random.key_data(key),
      worst=found,
      longest=found.contributes,
      present=none,
      absent=none,
    )

  def included(self, state: AuditState) -> Array:
    """Return the coins: who is in the run; shape=(canaries,), bool."""
    return jax.random.bernoulli(_key(state, _COINS), shape=(self.size,))

  def present(self, state: AuditState, round_: Array) -> Array:
    """Return who takes part in a round, shape=(canaries + 1,), bool."""
    rate, period = self.participation[:2]
    drawn = jax.random.bernoulli(
      jax.random.fold_in(_key(state, _DRAWS), round_), rate, (self.size + 1,)
    )
    turn = jnp.arange(self.size + 1) % period == round_ % period
    return drawn & turn & jnp.append(self.included(state), True)

  def plant(
    self,
    state: AuditState,
    round_: Array,
    total: PyTree,
    contribute: Contribute,
    clip_norm: Array,
    order: int = 2,
  ) -> tuple[PyTree, AuditState]:
    """Return the sum with canaries' contributions, and the new state.

    Args:
      state: as it is.
      round_: shape=(), int32.
      total: the clients' contributions, summed.
      contribute: raw update -> contribution, as a client's is made.
      clip_norm: shape=(); of this round.
      order: 1 or 2; of the norm that clipping bounds.
    """
    present = self.present(state, round_)
    everyone = self._directions(state, total.update)

    def add(
      update: PyTree, planted: tuple[PyTree, Array]
    ) -> tuple[PyTree, Array]:
      total, longest = planted
      one = contribute(update)
      total = jax.tree.map(
        lambda t, x: t + x.astype(t.dtype), total, _held(one)
      )
      for part in one:
        longest = jnp.maximum(longest, measured(part, order))
      return total, longest

    def canary(i: Array, planted: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
      return lax.cond(
        present[i],
        lambda so_far: add(self._update(i, everyone, clip_norm), so_far),
        lambda so_far: so_far,
        planted,
      )

    planted = lax.fori_loop(0, self.size, canary, (total, state.longest))
    total, longest = lax.cond(
      present[-1],
      lambda so_far: add(_worst_update(state, clip_norm), so_far),
      lambda so_far: so_far,
      planted,
    )
    return total, state._replace(longest=longest)

  def observe(
    self,
    state: AuditState,
    round_: Array,
    sums: tuple[PyTree, PyTree, PyTree],
    contribute: Contribute,
    clip_norm: Array,
  ) -> AuditState:
    """Return the state after the noisy sum of a round was seen.

    First the sum loses what an adversary may know: all contributions but the
    one that is scored.

    Args:
      state: as `plant` left it.
      round_: shape=(), int32.
      sums: three sums of updates: the clients', that with canaries, and that
        with noise, which is released.
      contribute: raw update -> contribution, as a client's is made.
      clip_norm: shape=(); of this round.
    """
    clients, everyone, noisy = sums
    present = self.present(state, round_)
    mine = _held(contribute(_worst_update(state, clip_norm)).update)
    there = jax.tree.map(lambda x: jnp.where(present[-1], x, 0), mine)
    left = jax.tree.map(lambda x, s, c: x - s - c, noisy, clients, there)
    directions = self._directions(state, clients)
    scores = self._sums(jax.tree.map(jnp.multiply, left, directions))
    left = jax.tree.map(lambda x, s, c: x - (s - c), noisy, everyone, there)
    parts = jax.tree.map(lambda x, d: jnp.sum(x * d), left, unit(mine))
    scores = jnp.append(scores, jax.tree.reduce(jnp.add, parts))
    return state._replace(
      present=_more(state.present, scores, present),
      absent=_more(state.absent, scores, ~present),
    )

  def evidence(self, state: AuditState, unit: float) -> Evidence:
    """Return what an audit needs; `unit` as in `Evidence`."""
    return Evidence(
      included=self.included(state),
      present=state.present,
      absent=state.absent,
      longest=state.longest,
      unit=jnp.asarray(unit, jnp.float32),
    )

  def _update(self, i: Array, everyone: PyTree, clip_norm: Array) -> PyTree:
    """Return the raw update of a canary.

    Args:
      i: shape=(), int32; which.
      everyone: all directions, added up.
      clip_norm: shape=().
    """
    kind = i % len(KINDS)
    length = clip_norm * jnp.where(kind == _LONG, LONG, EXACT)
    length = jnp.minimum(length, LARGEST)
    extreme = (kind == _HUGE) | (kind == _SPIKE)
    elsewhere = jnp.where(kind == _SPIKE, SUBNORMAL, 0)

    def leaf(direction: Array, owner: Array) -> Array:
      own = jnp.where(
        extreme, LARGEST * jnp.sign(direction), length * direction
      )
      return jnp.where((owner == i) & (direction != 0), own, elsewhere)

    return jax.tree.map(leaf, everyone, self._owners(everyone))

  def _owners(self, like: PyTree) -> PyTree:
    """Return which canary owns each coordinate; leaves as `like`, int32."""
    return split(jnp.arange(_dimension(like)) % self.size, like)

  def _directions(self, state: AuditState, like: PyTree) -> PyTree:
    """Return the sum of canaries' directions, each 1 long; leaves as `like`.

    Signs are random. A spike's direction is its first coordinate alone, another
    canary's is all coordinates that it owns.
    """
    dimension = _dimension(like)
    sign = jax.random.rademacher(_key(state, _SIGNS), (dimension,), jnp.float32)
    place = jnp.arange(dimension)
    canary = place % self.size
    count = dimension // self.size + (canary < dimension % self.size)
    spike = canary % len(KINDS) == _SPIKE
    scale = jnp.where(spike, place < self.size, count**-0.5)
    return split(sign * scale, like)

  def _sums(self, tree: PyTree) -> Array:
    """Return the sum of what each canary owns; shape=(canaries,), float32."""
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    padded = jnp.pad(flat, (0, -len(flat) % self.size))
    return padded.reshape(-1, self.size).sum(0)


def _dimension(tree: PyTree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def _key(state: AuditState, purpose: int) -> Key:
  return jax.random.fold_in(jax.random.wrap_key_data(state.key), purpose)


def _worst_update(state: AuditState, clip_norm: Array) -> PyTree:
  return raw(state.worst.direction, state.worst.size * clip_norm)


def _held(contribution: PyTree) -> PyTree:
  """Return a contribution with every coordinate cut to `HELD`.

  Only a clip that is broken needs it, whose contribution was measured before;
  the run shall last until its audit.
  """
  return jax.tree.map(
    lambda x: jnp.clip(jnp.where(jnp.isnan(x), HELD, x), -HELD, HELD),
    contribution,
  )


def _more(moments: Moments, scores: Array, where: Array) -> Moments:
  """Return the moments with a round's scores added.

  Args:
    moments: so far.
    scores: shape=(canaries + 1,), float32.
    where: shape=(canaries + 1,), bool; which of them count.
  """
  counted = jnp.where(where, scores, 0)
  return Moments(
    moments.number + where,
    moments.total + counted,
    moments.squares + counted**2,
  )
