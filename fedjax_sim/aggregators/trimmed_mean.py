"""The coordinate-wise trimmed mean.

Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal
statistical rates" (arXiv 1803.01498): of every coordinate the largest and the
smallest numbers are left out, and the mean is taken of the rest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.stacked import empty_stack, filled_rows, put_wave
from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  PyTree,
  validate,
)
from fedjax_sim.core.tree import accumulator_dtype

_ROUNDING = 1e-4  # a tenth of 30 clients is three, in float32, too


def trimmed_mean(
  fraction: float = 0.1, number: int | None = None
) -> Aggregator:
  """Return the mean of each coordinate without its extreme numbers.

  Withstands as many attackers as are left out at either end, `number` or
  floor(fraction * clients), which have to be fewer than half of the clients;
  weights count nothing. With fewer clients present, at least one number, or
  the two in the middle, are kept. Memory is cohort x parameters, over all
  devices.

  Args:
    fraction: of the present clients, left out at each end; the paper's beta,
      >= 0 and < 0.5.
    number: how many clients are left out at each end, instead of `fraction`.

  Raises:
    TypeError, ValueError: a number is out of range.

  Example:
    trimmed_mean(0.25)  # of 8 clients the 4 in the middle
  """
  least = 1
  hparams = {"fraction": validate.number("fraction", fraction, ge=0, lt=0.5)}
  if number is not None:
    number = validate.integer("number", number, ge=0)
    hparams, least = {"number": float(number)}, 2 * number + 1

  def finish(
    acc: PyTree, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight
    stack, filled = acc
    numbers = context.hparams
    wanted = numbers.get("number")
    if wanted is None:
      wanted = numbers["fraction"] * count
    cut = jnp.floor(wanted + _ROUNDING).astype(count.dtype)
    cut = jnp.minimum(cut, jnp.maximum(count - 1, 0) // 2)
    place = jnp.arange(len(filled))
    kept = (place >= cut) & (place < count - cut)
    left = jnp.maximum(count - 2 * cut, 1)

    def mean(s: Array) -> Array:
      s = s.astype(accumulator_dtype(s))
      s = jnp.sort(filled_rows(filled, s, jnp.inf), axis=0)
      return jnp.sum(filled_rows(kept, s, 0), axis=0) / left.astype(s.dtype)

    return jax.tree.map(mean, stack)

  return Aggregator(
    empty_stack,
    put_wave,
    finish,
    needs_all_updates=True,
    coordinatewise=True,
    hparams=hparams,
    min_clients=least,
  )
