"""Federated quantiles: read from a histogram of the clients' numbers.

A client reports how its numbers are distributed over cells of equal width, as
shares that add up to 1. The server adds up the reports of all rounds, and
interpolates the quantiles linearly within cells. With all clients a quantile is
off by no more than a cell.

With `privacy.central` a client's report is clipped as one vector, and noise is
added to the sum. Shares of one feature are at most 1 long, in L1 and in L2, so
that a clipping norm of 1 changes nothing; of several features, at most the root
of their number in L2. Noise on n clients' mean with standard deviation s in
every cell moves the fraction of numbers below the p-quantile, i cells up of B,
with standard deviation s sqrt(i (1 - p)^2 + (B - i) p^2): fewer cells are
coarser, but less noisy. A clipped or noisy histogram is no distribution; its
sums from the left are made monotone by their running maximum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim import core
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Batch,
  Client,
  Context,
  HParams,
  Key,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.training.local import WEIGHTINGS, metric
from fedjax_sim.training.statistics import Sums, check_model, sum_pass


class HistogramState(NamedTuple):
  """The quantiles, and what they are read from.

  Attributes:
    variables: of the task.
    histogram: shape=(features, bins), float32; sum over rounds of the clients'
      mean shares times their weight.
  """

  variables: Variables
  histogram: Array


def quantiles(
  task: Task,
  *,
  bins: int = 128,
  decay: float = 1.0,
  weighting: str = "examples",
) -> Algorithm:
  """Return quantiles by a histogram over the task's range.

  Numbers beyond the range count as in its outermost cells.

  Args:
    task: quantiles, as `models.quantiles` makes.
    bins: number of cells.
    decay: factor of earlier rounds in each round, from 0 to 1: 1 counts all
      rounds alike, less forgets.
    weighting: as in `fedavg`; with `examples`, quantiles are those of the
      pooled data, with `uniform` all clients count the same.

  Raises:
    TypeError, ValueError: names the field.
  """
  numbers = check_model(
    task,
    {"quantiles"},
    {"low", "high", "probabilities"},
    function="features",
    model="quantiles",
    message="algorithm.name='quantiles' finds quantiles, and the model has"
    " none",
  )
  count = validate.integer("bins", bins, ge=2, le=2**20)
  forget = validate.number("decay", decay, ge=0, le=1)
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  features = shapes["quantiles"].shape[0]

  def init(key: Key, hparams: HParams) -> HistogramState:
    return HistogramState(task.init(key), jnp.zeros((features, count)))

  def zero(client: Client) -> Array:
    return jnp.zeros((features, count))

  def term(client: Client, batch: Batch) -> Array:
    frozen = client.message.frozen
    x = core.in_float32(numbers(client.message, batch.examples))
    low, high = core.in_float32((frozen["low"], frozen["high"]))
    cell = jnp.floor((x - low) / (high - low) * count)
    cell = jnp.clip(cell, 0, count - 1).astype(jnp.int32)
    ones = jnp.broadcast_to(batch.mask[:, None], cell.shape)
    return (
      zero(client)
      .at[jnp.arange(features)[None], cell]
      .add(ones.astype(jnp.float32))
    )

  def finish(client: Client, carry: Sums) -> Report:
    histogram = compensated.rounded(carry.terms)
    loss = metric(carry.loss)
    return Report(
      update=histogram / jnp.maximum(loss.weight, 1),
      weight=weigh(client, loss),
      metrics={"loss": loss},
    )

  def apply(
    server: HistogramState, aggregate: Aggregate, context: Context
  ) -> HistogramState:
    params, _, frozen = server.variables
    decay = context.hparams["decay"].astype(jnp.float32)
    histogram = decay * server.histogram + aggregate.weight * aggregate.update
    histogram = histogram.astype(jnp.float32)
    found, known = _read(histogram, frozen)
    before = params["quantiles"]
    found = jnp.where(known[:, None], found.astype(before.dtype), before)
    variables = server.variables._replace(params={"quantiles": found})
    return HistogramState(variables, histogram)

  return Algorithm(
    init=init,
    broadcast=lambda server: server.variables,
    passes=(sum_pass(task, zero, term),),
    finish=finish,
    apply=apply,
    variables=lambda server: server.variables,
    with_model=lambda server, variables: server._replace(variables=variables),
    hparams={"decay": forget},
  )


def _read(histogram: Array, frozen: dict[str, Array]) -> tuple[Array, Array]:
  """Return the quantiles of a histogram, and whether it has any.

  Args:
    histogram: shape=(features, bins); with noise, of any sign.
    frozen: the task's `low`, `high` and `probabilities`.

  Returns:
    Quantiles, shape=(features, probabilities), and shape=(features,), bool;
    False where noise has left nothing.
  """
  bins = histogram.shape[1]
  below = lax.cummax(jnp.maximum(jnp.cumsum(histogram, axis=1), 0), axis=1)
  total = below[:, -1]
  target = frozen["probabilities"][None] * total[:, None]
  cell = jax.vmap(jnp.searchsorted)(below, target)
  cell = jnp.minimum(cell, bins - 1)
  padded = jnp.pad(below, ((0, 0), (1, 0)))
  start = jnp.take_along_axis(padded, cell, axis=1)
  inside = jnp.take_along_axis(below, cell, axis=1) - start
  share = (target - start) / jnp.where(inside > 0, inside, 1)
  low, high = frozen["low"], frozen["high"]
  position = (cell + jnp.clip(share, 0, 1)) / bins
  return low + (high - low) * position, total > 0
