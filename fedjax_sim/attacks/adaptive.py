"""Adaptive: attackers follow the derivative of the aggregator itself.

They know the honest updates and the aggregator, and look for the update that
moves the aggregate farthest. They begin with the best of the known attacks
(ALIE, inner-product manipulation, Min-Max, Min-Sum, and some steps in their
directions) and go up the gradient of the damage, through the aggregator, in
steps that are doubled after a success and halved after a failure. What they
send is the best that they have seen, so it does at least as much damage in its
round as the known attacks that are within its bound.

Tramer et al. 2020, "On adaptive attacks to adversarial example defenses" (arXiv
2002.08347), say why defenses should be measured like this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.attacks.alie import deviations_of
from fedjax_sim.attacks.attack import Attack, Honest
from fedjax_sim.attacks.collusion import (
  directions,
  norm,
  plus,
  scaled,
  standard_deviation,
)
from fedjax_sim.attacks.min_max import farthest, farthest_by_sum, unit
from fedjax_sim.core import Array, HParams, PyTree, validate
from fedjax_sim.core.tree import inverse_power

OBJECTIVES = ("distance", "inner_product")
_EQUAL = 1e-4  # relative; damages that differ by less are equal
_SHARES = (1.0, 0.25, 0.0625)  # of the bound, where the search begins


class _Search(NamedTuple):
  """Where the ascent is.

  Attributes:
    delta: what attackers add to the honest mean.
    damage: shape=(), float32; what it does.
    step: shape=(), float32; the length of the next step.
  """

  delta: PyTree
  damage: Array
  step: Array


def adaptive(
  steps: int = 10,
  radius: float = 2.0,
  objective: str = "distance",
  epsilon: float = 0.5,
) -> Attack:
  """Send the update that a search finds to do the most damage.

  All attackers send the same one. Each round aggregates about 15 + 4 `steps`
  times, and whole updates travel to every device.

  Args:
    steps: of gradient ascent in each round, >= 0.
    radius: how far from the honest mean, relative to the honest update that is
      farthest from it, > 0; with 2, Min-Max is always within it.
    objective: the damage: "distance" of the aggregate from the honest mean, or
      "inner_product", by how much it points the other way.
    epsilon: of the inner-product manipulation that the search begins with, > 0.

  Raises:
    TypeError, ValueError: a number is out of range, or no such objective.

  Example:
    adaptive(steps=20, objective="inner_product")
  """
  steps = validate.integer("steps", steps, ge=0)
  validate.one_of("objective", objective, OBJECTIVES)
  hparams = {
    "radius": validate.number("radius", radius, gt=0),
    "epsilon": validate.number("epsilon", epsilon, gt=0),
  }

  def collude(honest: Honest, hparams: HParams) -> PyTree:
    longest = farthest_by_sum(honest, honest.mean)
    bound = hparams["radius"] * longest
    # Squares of very long, or short, updates are out of range.
    unit_of_all = inverse_power(jnp.maximum(bound, norm(honest.mean, honest)))

    def damage(delta: PyTree) -> Array:
      made = scaled(honest.aggregate(plus(honest.mean, delta)), unit_of_all)
      mean = scaled(honest.mean, unit_of_all)
      if objective == "distance":
        apart = plus(made, scaled(mean, jnp.float32(-1)))
        return _inner(apart, apart)
      return -_inner(made, mean)

    def within(delta: PyTree) -> PyTree:
      length = norm(delta, honest)
      longer = length > bound
      cut = jnp.where(longer, bound / jnp.where(longer, length, 1), 1)
      return scaled(delta, cut)

    def ascend(at: _Search, _: None) -> tuple[_Search, None]:
      gradient = jax.grad(damage)(at.delta)
      known = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), gradient)
      # Where an aggregator leaves attackers out, nothing depends on them.
      flat = norm(known, honest) == 0
      along = jax.tree.map(lambda g, d: jnp.where(flat, -d, g), known, at.delta)
      step = scaled(unit(along, honest), at.step)
      new = within(plus(at.delta, step))
      found = damage(new)
      better = found > at.damage + _EQUAL * jnp.abs(at.damage)
      pick = lambda x, y: jnp.where(better, x, y)
      return _Search(
        delta=jax.tree.map(pick, new, at.delta),
        damage=pick(found, at.damage),
        step=pick(2 * at.step, at.step / 2),
      ), None

    delta = _best_known(honest, bound, hparams["epsilon"], within, damage)
    first = _Search(delta, damage(delta), bound / 2)
    last, _ = lax.scan(ascend, first, length=steps)
    return plus(honest.mean, last.delta)

  return Attack(hparams=hparams, collude=collude, asks_aggregate=True)


def _best_known(
  honest: Honest,
  bound: Array,
  epsilon: Array,
  within: Callable[[PyTree], PyTree],
  damage: Callable[[PyTree], Array],
) -> PyTree:
  """Return what to add to the mean, of all that is known to do damage.

  Args:
    honest: what attackers know.
    bound: shape=(); the most that may be added, by its norm.
    epsilon: of the inner-product manipulation.
    within: shortens what is longer than the bound.
    damage: what is to be large.
  """
  units = {k: unit(x, honest) for k, x in directions(honest).items()}
  mean = norm(honest.mean, honest)
  deviation = norm(standard_deviation(honest), honest)
  common = [bound * share for share in _SHARES]
  common.append(farthest_by_sum(honest, honest.mean))
  lengths = {name: [*common, farthest(honest, units[name])] for name in units}
  lengths["unit"].append((1 + epsilon) * mean)  # inner-product manipulation
  lengths["std"].append(deviations_of(honest) * deviation)  # ALIE
  which = [i for i, name in enumerate(units) for _ in lengths[name]]
  length = jnp.stack([jnp.asarray(x) for name in units for x in lengths[name]])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *units.values())

  def candidate(which: Array, length: Array) -> PyTree:
    return within(scaled(jax.tree.map(lambda s: s[which], stacked), length))

  tried = jnp.asarray(which), length
  found = lax.map(lambda one: damage(candidate(*one)), tried)
  # The first of those that are as good but for rounding, on any device.
  known = jnp.where(jnp.isfinite(found), found, -jnp.inf)
  most = jnp.max(known)
  best = jnp.argmax(known >= most - _EQUAL * jnp.abs(most))
  return candidate(tried[0][best], length[best])


def _inner(update: PyTree, other: PyTree) -> Array:
  """Return the inner product of two updates, shape=()."""
  products = jax.tree.map(
    lambda x, y: jnp.vdot(x, y.astype(x.dtype)), update, other
  )
  return sum(jax.tree.leaves(products), jnp.zeros((), jnp.float32))
