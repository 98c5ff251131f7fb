"""Federated k-means: one of Lloyd's iterations per round.

A client assigns its examples to the nearest centroids, and reports for each the
number of its examples and the sum of their differences from it. The server
moves centroids to the means. With all clients that is Lloyd's algorithm on the
pooled data (Lloyd 1982, "Least squares quantization in PCM").

With `privacy.central` the differences and counts of a client are clipped as one
vector, and noise is added to their sum over clients, as in DPLloyd (Su et al.
2016, "Differentially private k-means clustering", arXiv 1504.05998), which also
starts independently of the data. DPLloyd sums the examples themselves;
differences from centroids are shorter, so less noise suffices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
  PyTree,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.training import optimizers
from fedjax_sim.training.local import WEIGHTINGS, metric
from fedjax_sim.training.optimizers import Optimizer, descend
from fedjax_sim.training.statistics import Sums, check_model, sum_pass

EMPTY = ("keep", "split")
_APART = 0.01  # of the range: how far a centroid begins from the one it joins
_TAG = 0x73706C74  # of the key: no number that an optimizer would fold in


class KMeansState(NamedTuple):
  """The centroids and the state of the server optimizer."""

  variables: Variables
  optimizer: PyTree


class Clusters(NamedTuple):
  """What examples say of every cluster.

  Attributes:
    gaps: shape=(clusters, features); the sum of example minus centroid.
    counts: shape=(clusters,); how many examples.
  """

  gaps: Array
  counts: Array


def kmeans(
  task: Task,
  server_optimizer: Optimizer,
  *,
  weighting: str = "examples",
  count_weight: float = 1.0,
  least_share: float = 0.0,
  empty: str = "keep",
) -> Algorithm:
  """Return k-means: centroids move to the means of their nearest examples.

  A client reports means over its examples, and its weight is their number. The
  server takes the vector from a centroid to the mean as a negative gradient;
  afterwards centroids are clipped to the task's range.

  Args:
    task: with centroids, as `models.kmeans` makes.
    server_optimizer: sgd with learning rate 1 is Lloyd's algorithm.
    weighting: as in `fedavg`; with `examples` and all clients, the means are
      those of the pooled data.
    count_weight: scale of the counts in a report relative to the distances,
      > 0. Without noise it has no effect; with clipping and noise, a larger
      value makes the counts more accurate and the sums less.
    least_share: clusters with a smaller share of the examples, or none, count
      as empty; in [0, 1).
    empty: how the centroids of empty clusters move: `keep` leaves them in
      place, `split` moves them next to the centroids of the largest clusters.

  Raises:
    TypeError, ValueError: names the field.
  """
  logits = check_model(
    task,
    {"centroids"},
    {"low", "high"},
    function="logits",
    model="kmeans",
    message="algorithm.name='kmeans' moves centroids, and the model has none"
    " that it may move",
  )
  optimizers.check("server_optimizer", server_optimizer)
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)
  worth = validate.number("count_weight", count_weight, gt=0)
  least = validate.number("least_share", least_share, ge=0, lt=1)
  validate.one_of("empty", empty, EMPTY)

  def init(key: Key, hparams: HParams) -> KMeansState:
    variables = task.init(key)
    optimizer = server_optimizer.build(hparams["server"])
    return KMeansState(variables, optimizer.init(variables.params))

  def zero(client: Client) -> Clusters:
    centroids = client.message.params["centroids"]
    return Clusters(centroids, centroids[:, 0])

  def term(client: Client, batch: Batch) -> Clusters:
    variables = client.message
    nearest = jnp.argmax(logits(variables, batch.examples), axis=-1)
    centroids = variables.params["centroids"]
    own = jax.nn.one_hot(nearest, len(centroids), dtype=bool)
    own &= batch.mask[:, None]
    x = batch.examples["x"].reshape(len(nearest), -1)
    gaps = x[:, None] - centroids[None]
    gaps = core.in_float32(jnp.where(own[..., None], gaps, 0))
    return Clusters(jnp.sum(gaps, axis=0), jnp.sum(own, axis=0))

  def finish(client: Client, carry: Sums) -> Report:
    gaps, counts = compensated.rounded(carry.terms)
    examples = jnp.maximum(jnp.sum(counts), 1)
    worth = client.hparams["count_weight"].astype(counts.dtype)
    return Report(
      update=Clusters(gaps / examples, worth * counts / examples),
      weight=weigh(client, metric(carry.loss)),
      metrics={"loss": metric(carry.loss)},
    )

  def apply(
    server: KMeansState, aggregate: Aggregate, context: Context
  ) -> KMeansState:
    params, buffers, frozen = server.variables
    gaps, counts = aggregate.update
    counts = counts / context.hparams["count_weight"].astype(counts.dtype)
    total = jnp.maximum(jnp.sum(counts), 0)
    full = counts > context.hparams["least_share"].astype(counts.dtype) * total
    divisor = jnp.where(full, counts, 1)
    way = jnp.where(full[:, None], gaps / divisor[:, None], 0)
    params, state = descend(
      server_optimizer.build(context.hparams["server"]),
      {"centroids": -way.astype(params["centroids"].dtype)},
      server.optimizer,
      params,
    )
    centroids = params["centroids"]
    if empty == "split":
      key = jax.random.fold_in(context.key, _TAG)
      width = frozen["high"] - frozen["low"]
      centroids = _split(centroids, counts, full, _APART * width, key)
    centroids = jnp.clip(centroids, frozen["low"], frozen["high"])
    variables = Variables({"centroids": centroids}, buffers, frozen)
    return KMeansState(variables, state)

  return Algorithm(
    init=init,
    broadcast=lambda server: server.variables,
    passes=(sum_pass(task, zero, term),),
    finish=finish,
    apply=apply,
    variables=lambda server: server.variables,
    with_model=lambda server, variables: server._replace(variables=variables),
    hparams={
      "server": server_optimizer.hparams,
      "count_weight": worth,
      "least_share": least,
    },
  )


def _split(
  centroids: Array, counts: Array, full: Array, apart: Array, key: Key
) -> Array:
  """Return centroids, those of empty clusters next to those of the largest.

  The smallest goes to the largest, the second smallest to the second largest,
  and so on; if most are empty, several go to the same one. If all are empty,
  none moves.

  Args:
    centroids: shape=(clusters, features).
    counts: shape=(clusters,); with noise, of any sign.
    full: shape=(clusters,), bool; the others are empty.
    apart: shape=(); standard deviation of every coordinate's distance.
    key: of the directions.
  """
  largest_first = jnp.argsort(-counts)
  smaller = jnp.argsort(jnp.argsort(counts))  # how many are
  goal = largest_first[smaller % jnp.maximum(jnp.sum(full), 1)]
  direction = jax.random.normal(key, centroids.shape, centroids.dtype)
  moved = centroids[goal] + apart.astype(centroids.dtype) * direction
  empty = ~full & jnp.any(full)
  return jnp.where(empty[:, None], moved, centroids)
