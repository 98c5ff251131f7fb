"""Cluster centers: an example belongs to the nearest one.

As a task it can be trained as any other: gradient steps on the squared distance
to the nearest centroid are mini-batch k-means. The algorithm `kmeans` moves
centroids to the means of their examples instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  Task,
  Variables,
  validate,
)

_TRIES = 100  # random points for a place among the others, before giving up
_HALVINGS = 12  # of the distance between them


def _uniform(key: Key, clusters: int, features: int) -> Array:
  """Draw independent points of the unit cube, shape=(clusters, features)."""
  return jax.random.uniform(key, (clusters, features))


def _spread(key: Key, clusters: int, features: int) -> Array:
  """Draw points of the unit cube, as far apart as random search finds.

  Balls of radius a around them lie in the cube, and do not overlap. Points are
  drawn until each has its place, or one has found none in 100 draws; halving
  finds the largest a that works (Su et al. 2016, "Differentially private
  k-means clustering", arXiv 1504.05998).

  Returns:
    shape=(clusters, features).
  """
  draws = jax.random.uniform(key, (clusters, _TRIES, features))

  def placed(radius: Array) -> tuple[Array, Array]:
    """Return the points, and whether there was a place for each."""

    def place(points: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
      i, drawn = given
      drawn = radius + (1 - 2 * radius) * drawn
      gaps = jnp.sum((drawn[:, None] - points[None]) ** 2, axis=-1)
      taken = jnp.arange(clusters)[None] < i
      free = jnp.all((gaps >= (2 * radius) ** 2) | ~taken, axis=1)
      return points.at[i].set(drawn[jnp.argmax(free)]), jnp.any(free)

    nowhere = jnp.zeros((clusters, features), draws.dtype)
    points, found = lax.scan(place, nowhere, (jnp.arange(clusters), draws))
    return points, jnp.all(found)

  def halve(
    i: Array, best: tuple[Array, Array, Array]
  ) -> tuple[Array, Array, Array]:
    low, high, points = best
    radius = (low + high) / 2
    new, found = placed(radius)
    return (
      jnp.where(found, radius, low),
      jnp.where(found, high, radius),
      jnp.where(found, new, points),
    )

  nothing, half = jnp.zeros(()), jnp.full((), 0.5)
  start = nothing, half, placed(nothing)[0]
  return lax.fori_loop(0, _HALVINGS, halve, start)[2]


INITS: dict[str, Callable[[Key, int, int], Array]] = {
  "spread": _spread,
  "uniform": _uniform,
}


def kmeans(
  example_shape: tuple[int, ...],
  num_classes: int,
  clusters: int | None = None,
  low: float = 0.0,
  high: float = 1.0,
  init: str = "uniform",
) -> Task:
  """Return centroids that begin in a range known beforehand, not at data.

  `Variables.params` is `centroids`, shape=(clusters, features), float32, and
  `Variables.frozen` the range, `low` and `high`. The loss is the squared
  distance to the nearest centroid, the logits are minus those to all.

  Args:
    example_shape: shape of one input.
    num_classes: clusters, unless given.
    clusters: how many; None: as many as classes.
    low: the least that a feature may be.
    high: the greatest.
    init: where centroids begin: `uniform` in the range, or `spread`: as far
      from each other as random search finds.

  Raises:
    TypeError, ValueError: names the field.
  """
  features = math.prod(example_shape)
  field = "num_classes" if clusters is None else "clusters"
  count = validate.integer(field, num_classes if clusters is None else clusters)
  low = validate.number("low", low)
  high = validate.number("high", high, gt=low)
  draw = validate.lookup("init", init, INITS)

  def first(key: Key) -> Variables:
    bounds = {"low": jnp.float32(low), "high": jnp.float32(high)}
    centroids = low + (high - low) * draw(key, count, features)
    return Variables({"centroids": centroids}, frozen=bounds)

  def logits(variables: Variables, examples: Examples) -> Array:
    x = examples["x"]
    x = x.reshape(x.shape[0], -1)
    # Not by the binomial formula, which loses digits where centroids are near.
    gaps = x[:, None] - variables.params["centroids"][None]
    return -jnp.sum(gaps**2, axis=-1)

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    del key
    value = -jnp.max(logits(variables, examples), axis=-1)
    return Loss(value, jnp.ones_like(value))

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    value = -jnp.max(logits(variables, examples), axis=-1)
    return {"loss": Metric(value, jnp.ones_like(value))}

  return Task(first, loss, metrics, logits=logits)
