"""Checks of what aggregators and algorithms promise of themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.contract.compare import difference
from fedjax_sim.contract.outcome import Failed, NotApplicable, Outcome, Passed
from fedjax_sim.contract.rounds import Rounds
from fedjax_sim.contract.setting import Setting
from fedjax_sim.core import AggregationContext, Aggregator, Array, PyTree
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp

_CLIENTS = 5
_TERMS = 4.0 * _CLIENTS


def promises(setting: Setting) -> Outcome:
  """Hold `weighted_mean` and `coordinatewise` against what is computed."""
  aggregator = setting.aggregator
  rng = np.random.default_rng(0)
  updates = {
    "a": rng.normal(size=(_CLIENTS, 3)).astype(np.float32),
    "b": rng.normal(size=(_CLIENTS, 2, 2)).astype(np.float32),
  }
  weights = np.array([1, 4, 2, 0.5, 3], np.float32)
  told = []
  if aggregator.weighted_mean:
    found = aggregate(aggregator, updates, weights)
    expected = jax.tree.map(
      lambda x: np.average(x.astype(np.float64), axis=0, weights=weights),
      updates,
    )
    expected = jax.tree.map(lambda x, y: x.astype(y.dtype), expected, found)
    apart = difference(expected, found, _TERMS)
    if apart is not None:
      return Failed(
        "Aggregator.weighted_mean=True, and"
        f" {apart.sentence('as a weighted mean', 'by finish')}; leave it False."
      )
    told.append("weighted_mean")
  if aggregator.coordinatewise:
    whole = aggregate(aggregator, updates, weights)
    for name, x in updates.items():
      flat = x.reshape(_CLIENTS, -1)
      for i in range(flat.shape[1]):
        one = aggregate(aggregator, {"x": flat[:, i : i + 1]}, weights)["x"]
        apart = difference(whole[name].reshape(-1)[i : i + 1], one, _TERMS)
        if apart is not None:
          return Failed(
            "Aggregator.coordinatewise=True, and coordinate"
            f" {i} of {name!r} {apart.sentence('among others', 'by itself')};"
            " leave it False."
          )
    told.append("coordinatewise")
  if not told:
    return NotApplicable("neither weighted_mean nor coordinatewise is set")
  return Passed(" and ".join(told))


def aggregate(
  aggregator: Aggregator, updates: PyTree, weights: np.ndarray, seed: int = 0
) -> PyTree:
  """Return what an aggregator makes of updates, all of them in one wave.

  Args:
    aggregator: any.
    updates: leaves (clients, ...).
    weights: shape=(clients,), float32.
    seed: of the round's key.
  """
  key, count = jax.random.key(seed), jnp.int32(len(weights))
  numbers = jax.tree.map(jnp.float32, dict(aggregator.hparams))
  ranks = jnp.arange(len(weights), dtype=jnp.int32)
  context = AggregationContext(key, key, jnp.int32(0), ranks, count, numbers)
  present = jnp.ones(len(weights), bool)

  def run(updates: PyTree, weights: Array) -> PyTree:
    one = jax.tree.map(lambda x: x[0], updates)
    acc = aggregator.init(one, len(weights))
    acc = aggregator.add(acc, updates, weights, present, context)
    return aggregator.finish(acc, jnp.sum(weights), count, context)

  return jax.device_get(jax.jit(run)(updates, weights))


def is_random(aggregator: Aggregator, params: PyTree) -> bool:
  """Return whether the aggregate depends on the round's key.

  Args:
    aggregator: any.
    params: shapes and dtypes of an update.
  """
  rng = np.random.default_rng(0)
  updates = jax.tree.map(
    lambda x: rng.normal(size=(4, *x.shape)).astype(x.dtype), params
  )
  weights = np.ones(4, np.float32)
  first, *others = (
    aggregate(aggregator, updates, weights, seed) for seed in range(3)
  )
  return any(difference(first, other, 0.0) is not None for other in others)


def private_weights(rounds: Rounds) -> Outcome:
  """Check that a private run may take weights as they are: at most 1.

  Privacy bounds what a client can move, so a weight above `privacy.max_weight`
  counts as that; without it, and under most local mechanisms, every client
  counts 1, whatever it reports. An algorithm that counts on larger weights is
  another one there.
  """
  setting = rounds.setting
  algorithm = setting.private_algorithm()
  if algorithm.privacy is not None:
    return Passed("it is private already")
  server = jax.eval_shape(
    algorithm.init, jax.random.key(0), dict(algorithm.hparams)
  )
  report = report_shapes(algorithm, server, algorithm.hparams)
  if jax.tree.leaves(report.buffers):
    return NotApplicable("clients send buffers, which privacy refuses")
  statistics = 1.0 if jax.tree.leaves(report.statistics) else None
  try:
    with_central_dp(
      algorithm,
      CentralDPConfig(
        clip_norm=1.0,
        noise_multiplier=1.0,
        denominator=float(len(rounds.ids)),
        statistics_norm=statistics,
      ),
    )
  except ValueError as error:
    return NotApplicable(f"it cannot be private: {error}")
  if algorithm is not setting.algorithm:
    rounds = Rounds(dataclasses.replace(setting, algorithm=algorithm))
  planned = rounds.plan(done=0)
  found = rounds.run(rounds.first, planned).metrics.client_values["weight"]
  ids = planned.cohorts.client[0]
  weights = dict(
    zip(ids[ids >= 0].tolist(), found[ids >= 0].tolist(), strict=True)
  )
  largest = max(weights, key=lambda ident: weights[ident])
  if weights[largest] > 1:
    size = int(rounds.simulator().splits[0].sizes[largest])
    listed = ", ".join(f"{k}: {v:g}" for k, v in sorted(weights.items()))
    return Failed(
      f"client {largest}, with {size} examples, reports the weight"
      f" {weights[largest]:g} ({listed}). A private run bounds weights: without"
      " privacy.max_weight all clients count 1, and the mean is another one."
      " Report a weight of at most 1, such as jnp.float32(1), let the function"
      " take weighting='uniform', or set privacy.max_weight."
    )
  smallest = min(weights.values())
  if smallest < 0:
    return Failed(f"a client reports the weight {smallest:g}; give >= 0.")
  return Passed(f"weights of {smallest:g} to {weights[largest]:g}")
