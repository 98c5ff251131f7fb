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
from fedjax_sim.engine.statistics import cosine, gradient_statistics


class Entry(NamedTuple):
  """Of one client, until the round ends.

  Attributes:
    update: as transformed.
    columns: name -> number, shape=().
  """

  update: PyTree
  columns: dict[str, Array]


def entry(report: Report, update: PyTree) -> Entry:
  """What is told of a client but for what the others decide.

  Args:
    report: as it is sent.
    update: as transformed, whatever `Algorithm.send` makes of it.
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
  """The log's numbers, shape=(waves, lanes), of one (virtual) device.

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
