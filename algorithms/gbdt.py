"""Federated gradient-boosted trees: one level of one tree per round.

With the trees so far a client computes the first and second derivatives g and h
of its examples' losses, and reports sums of both for every node of the level,
feature and cell of the feature's range. As in XGBoost (Chen and Guestrin 2016,
arXiv 1603.02754, equations 6 and 7), the server splits each node where

    (G_L^2 / (H_L + l2) + G_R^2 / (H_R + l2) - G^2 / (H + l2)) / 2 - min_gain

is greatest, if that is positive, and after the last level gives every leaf

    -rate G / (H + l2).

With all clients the trees are those of the pooled data. Clients learn the trees
and nothing else; the server learns the sums, which any mechanism for updates
makes private.
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
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.training.local import WEIGHTINGS, metric
from fedjax_sim.training.statistics import Sums, check_model, sum_pass
from fedjax_sim.training.trees import best_splits, descended


class Forest(NamedTuple):
  """What the server has and sends.

  Attributes:
    variables: of the task; leaves of trees that are not finished are 0.
    tree: shape=(), int32; which one is growing; their number when all have.
    level: shape=(), int32; its next level.
  """

  variables: Variables
  tree: Array
  level: Array


def gbdt(
  task: Task,
  *,
  bins: int = 32,
  learning_rate: float = 0.3,
  l2: float = 1.0,
  min_gain: float = 0.0,
  min_child_weight: float = 1.0,
  weighting: str = "examples",
) -> Algorithm:
  """Return boosting with histograms; defaults are XGBoost's.

  After trees times depth rounds all trees are grown, and further rounds change
  nothing. The metric `trees` is how many were before the round. If not all
  clients take part, every level is grown on the examples of other ones.

  Args:
    task: trees, as `models.gbdt` makes.
    bins: cells of equal width of the task's range, between which splits lie;
      what is beyond the range is in the outermost cells.
    learning_rate: factor of leaves. A run's `server.learning_rate`, which a
      schedule multiplies.
    l2: added to sums of second derivatives.
    min_gain: what a split must gain; XGBoost's gamma.
    min_child_weight: least sum of second derivatives on either side of a split.
    weighting: as in `fedavg`; sums are those of the pooled data with
      `examples`.

  Raises:
    TypeError, ValueError: names the field.
  """
  logits = check_model(
    task,
    {"features", "thresholds", "values"},
    {"low", "high"},
    function="logits",
    model="gbdt",
    message="algorithm.name='gbdt' grows trees, and the model has none",
  )
  cells = validate.integer("bins", bins, ge=2, le=2**16)
  hparams = {
    "server": {
      "learning_rate": validate.number("learning_rate", learning_rate, ge=0)
    },
    "l2": validate.number("l2", l2, ge=0),
    "min_gain": validate.number("min_gain", min_gain, ge=0),
    "min_child_weight": validate.number(
      "min_child_weight", min_child_weight, ge=0
    ),
  }
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  count, leaves = shapes.params["values"].shape
  (features,) = shapes.frozen["low"].shape
  depth, nodes = leaves.bit_length() - 1, leaves // 2

  def zero(client: Client) -> Array:
    return jnp.zeros((nodes, features, cells, 2))

  def term(client: Client, batch: Batch) -> Array:
    variables, tree, level = client.message
    params = core.in_float32(variables.params)
    outputs = core.in_float32(logits(variables, batch.examples))
    margin, y = outputs[:, -1], batch.examples["y"]
    if outputs.shape[1] == 2:  # of the classes 0 and 1
      chance = jax.nn.sigmoid(margin)
      first, second = chance - (y > 0), chance * (1 - chance)
    else:
      first, second = margin - y.astype(margin.dtype), jnp.ones_like(margin)
    both = jnp.stack([first, second], axis=1)
    both = jnp.where(batch.mask[:, None], both, 0)
    x = core.in_float32(batch.examples["x"].reshape(len(margin), -1))
    own = jnp.minimum(tree, count - 1)
    node = descended(
      x, params["features"][own], params["thresholds"][own], level
    )
    low, high = core.in_float32(
      (variables.frozen["low"], variables.frozen["high"])
    )
    cell = jnp.floor((x - low[None]) / (high - low)[None] * cells)
    cell = jnp.clip(cell, 0, cells - 1).astype(jnp.int32)
    place = node[:, None], jnp.arange(features)[None], cell
    terms = jnp.broadcast_to(both[:, None], (*x.shape, 2))
    return zero(client).at[place].add(terms)

  def finish(client: Client, carry: Sums) -> Report:
    loss = metric(carry.loss)
    return Report(
      update=compensated.rounded(carry.terms) / jnp.maximum(loss.weight, 1),
      weight=weigh(client, loss),
      metrics={"loss": loss},
    )

  def apply(server: Forest, aggregate: Aggregate, context: Context) -> Forest:
    variables, tree, level = server
    numbers = context.hparams
    found = best_splits(
      aggregate.weight * aggregate.update,
      *(numbers[k] for k in ("l2", "min_gain", "min_child_weight")),
    )
    params = core.in_float32(variables.params)
    low, high = core.in_float32(
      (variables.frozen["low"], variables.frozen["high"])
    )
    edge = (found.cell + 1) / cells
    edge = low[found.feature] + (high - low)[found.feature] * edge
    edge = jnp.where(found.some, edge, jnp.finfo(edge.dtype).max)
    width = 2**level
    used = (jnp.arange(nodes) < width) & (tree < count)
    split = jnp.where(used, width - 1 + jnp.arange(nodes), leaves)
    row = jnp.full_like(split, tree)

    last = level == depth - 1
    sums = jnp.stack([found.left, found.right], axis=1).reshape(leaves, 2)
    below = sums[:, 1] + numbers["l2"]
    rate = numbers["server"]["learning_rate"]
    leaf = -rate * jnp.where(below > 0, sums[:, 0], 0)
    leaf = leaf / jnp.where(below > 0, below, 1)
    full = jnp.where(last, tree, count)
    after = {
      "features": params["features"]
      .at[row, split]
      .set(found.feature.astype(jnp.float32), mode="drop"),
      "thresholds": params["thresholds"].at[row, split].set(edge, mode="drop"),
      "values": params["values"].at[full].set(leaf, mode="drop"),
    }
    after = jax.tree.map(
      lambda new, x: new.astype(x.dtype), after, variables.params
    )
    return Forest(
      variables._replace(params=after),
      jnp.where(last & (tree < count), tree + 1, tree),
      jnp.where(last, 0, level + 1),
    )

  def init(key: Key, hparams: HParams) -> Forest:
    return Forest(task.init(key), jnp.int32(0), jnp.int32(0))

  return Algorithm(
    init=init,
    broadcast=lambda server: server,
    passes=(sum_pass(task, zero, term, lambda c: c.message.variables),),
    finish=finish,
    apply=apply,
    variables=lambda server: server.variables,
    with_model=lambda server, variables: server._replace(variables=variables),
    state_metrics=lambda server, hparams: {
      "trees": server.tree.astype(jnp.float32)
    },
    hparams=hparams,
  )
