"""What a round tells of every client by itself, where that is asked for.

Numbers of the update as it is sent, what the client reports, and the cosine of
its update with the cohort's mean, which is known only at the round's end: until
then each device keeps the updates of its clients.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Array, PyTree, Report, in_float32
from fedjax_sim.core.tree import scaled, tree_norm


class Entry(NamedTuple):
  """Of one client, until the round ends.

  Attributes:
    update: as transformed.
    columns: name -> number, shape=().
  """

  update: PyTree
  columns: dict[str, Array]


def entry(report: Report, update: PyTree) -> Entry:
  """Return a client's log entry, without what depends on other clients.

  Args:
    report: as it is sent.
    update: as transformed, whatever `Algorithm.postprocess_report` makes of it.
  """
  seen = gradient_statistics(update)
  sums = in_float32(report.metrics)
  means = {name: m.total / m.weight for name, m in sums.items()}
  return Entry(
    update,
    {
      **means,
      **{f"value/{name}": x for name, x in report.values.items()},
      "weight": report.weight,
      "update/norm": seen["norm"],
      "update/mean": -seen["mean"],  # which is the pseudo-gradient's
      "update/variance": seen["variance"],
    },
  )


def columns(
  entries: Entry, present: Array, direction: PyTree
) -> dict[str, Array]:
  """Return the log's numbers, shape=(waves, lanes), of a (virtual) device.

  Args:
    entries: of its clients, leaves (waves, lanes, ...).
    present: shape=(waves, lanes), bool; others' numbers are NaN.
    direction: the sum of all clients' updates by weight, which points where
      their mean does.
  """
  wave = jax.vmap(lambda update: cosine(update, direction))
  found = entries.columns | {
    # Wave by wave, as XLA would copy all updates.
    "update/cosine": lax.map(wave, entries.update)
  }
  return {k: jnp.where(present, x, jnp.nan) for k, x in found.items()}


def gradient_statistics(update: PyTree) -> dict[str, Array]:
  """Return statistics of a client's pseudo-gradient, its negated update.

  With n coordinates g (Dimitriadis et al. 2021, arXiv 2106.07578, weigh clients
  by such numbers):

  - norm: sqrt(sum g^2)
  - mean: sum g / n
  - magnitude: sqrt(sum g^2 / n)
  - variance: sum (g - mean)^2 / n

  Returns:
    name -> shape=(), float32 at least.
  """
  leaves = [
    x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for x in jax.tree.leaves(update)
  ]
  count = sum(x.size for x in leaves)
  mean = -sum(jnp.sum(x) for x in leaves) / count
  norm = tree_norm(update)
  spread = sum(jnp.sum((-x - mean.astype(x.dtype)) ** 2) for x in leaves)
  return {
    "norm": norm,
    "mean": mean,
    "magnitude": norm / count**0.5,
    "variance": spread / count,
  }


def cosine(a: PyTree, b: PyTree) -> Array:
  """Return the cosine of the angle between two updates, NaN if one is 0.

  Returns:
    shape=(), float32 at least. No square overflows, or is lost.
  """
  x, y = (jax.tree.leaves(scaled(tree)[0]) for tree in (a, b))
  dot = lambda u, v: sum(jnp.sum(s * t) for s, t in zip(u, v, strict=True))
  lengths = jnp.sqrt(dot(x, x)) * jnp.sqrt(dot(y, y))
  known = lengths > 0
  value = jnp.clip(dot(x, y) / jnp.where(known, lengths, 1), -1, 1)
  return jnp.where(known, value, jnp.nan)


def combine(stack: PyTree, weights: Array) -> PyTree:
  """Return the weighted mean of stacked updates, 0 if no weight is left.

  Args:
    stack: leaves (slots, ...).
    weights: shape=(slots,), >= 0.

  Returns:
    Leaves (...), in float32 at least.
  """
  total = jnp.sum(weights)
  shares = weights / jnp.where(total > 0, total, 1)

  def join(s: Array) -> Array:
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    return jnp.tensordot(shares.astype(s.dtype), s, axes=1)

  return jax.tree.map(join, stack)
