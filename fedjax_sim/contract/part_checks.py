"""Checks of what parts promise, and of aggregators and transforms alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import aggregators
from fedjax_sim.contract.compare import difference
from fedjax_sim.contract.outcome import Failed, NotApplicable, Outcome, Passed
from fedjax_sim.contract.rounds import Rounds
from fedjax_sim.contract.setting import Setting
from fedjax_sim.core import Aggregator, Purpose, PyTree, Shares, key_for
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp

_CLIENTS = 5
_TERMS = 4.0 * _CLIENTS


def promises(setting: Setting) -> Outcome:
  """Hold what an aggregator promises against what is computed."""
  aggregator = setting.aggregator
  rng = np.random.default_rng(0)
  updates = {
    "a": rng.normal(size=(_CLIENTS, 3)).astype(np.float32),
    "b": rng.normal(size=(_CLIENTS, 2, 2)).astype(np.float32),
    "c": rng.normal(size=_CLIENTS).astype(np.float32),
  }
  weights = np.array([1, 4, 2, 0.5, 3], np.float32)
  told = []
  if aggregator.draws_noise:
    told.append("draws_noise")
  else:
    one, other = (
      aggregate(aggregator, updates, weights, noise_seed=s) for s in (0, 1)
    )
    if (apart := difference(one, other, 0.0)) is not None:
      return Failed(undeclared("Aggregator", f"finish: {apart.where}"))
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
  if aggregator.by_shares:
    whole = aggregate(aggregator, updates, weights)
    shared = _on_two_shares(aggregator, updates, weights)
    apart = difference(whole, shared, _TERMS)
    if apart is not None:
      return Failed(
        "Aggregator.by_shares=True, and"
        f" {apart.sentence('by one device', 'by two that share coordinates')};"
        " take sums over coordinates from context.shares, or leave it False."
      )
    told.append("by_shares")
  if not told:
    return NotApplicable(
      "none of weighted_mean, coordinatewise, by_shares and draws_noise is set"
    )
  return Passed(" and ".join(told))


def undeclared(part: str, where: str) -> str:
  """Return what is wrong with private noise that is not declared.

  Args:
    part: the class of the part.
    where: what depends on the noise.
  """
  return (
    f"{where} depends on noise_key, and {part}.draws_noise is False: the noise"
    " would be the same in every run, and known to all. Set it to True."
  )


def zeros(setting: Setting) -> Outcome:
  """Check that updates of zeros, as a gradient of 0 makes them, stay finite."""
  if setting.kind == "transform":
    made = transformed_zeros(setting)
    where = "Transform.apply makes of an update of zeros"
  else:
    params = _params(setting)
    rows = jax.tree.map(lambda x: np.zeros((4, *x.shape), x.dtype), params)
    made = aggregate(setting.aggregator, rows, np.ones(4, np.float32))
    where = "finish makes of four updates of zeros"
  for path, leaf in jax.tree_util.tree_leaves_with_path(made):
    if not np.isfinite(np.asarray(leaf, np.float64)).all():
      return Failed(
        f"{where} one that is not finite, at"
        f" {jax.tree_util.keystr(path).lstrip('.')}: look for 0 / 0; divide by"
        " jnp.where(x > 0, x, 1)."
      )
  return Passed("finite numbers")


def transformed_zeros(setting: Setting, seed: int = 0) -> PyTree:
  """Return what a transform makes of an update of zeros, on the host.

  Args:
    setting: whose last transform.
    seed: of the transform's key.
  """
  (*_, transform) = setting.transforms
  numbers = jax.tree.map(jnp.float32, dict(transform.hparams))
  params = _params(setting)

  def run(params: PyTree, update: PyTree) -> PyTree:
    shared = transform.init(params, numbers)
    own = transform.client_init(params, numbers)
    key = jax.random.key(seed)
    return transform.apply(update, shared, own, numbers, key).update

  update = jax.tree.map(jnp.zeros_like, params)
  return jax.device_get(jax.jit(run)(params, update))


def _params(setting: Setting) -> PyTree:
  """Return the parameters that a run begins with."""
  return setting.task.init(key_for(0, Purpose.INIT)).params


def aggregate(
  aggregator: Aggregator,
  updates: PyTree,
  weights: np.ndarray,
  seed: int = 0,
  noise_seed: int = 0,
) -> PyTree:
  """Return what an aggregator makes of updates, all of them in one wave.

  Args:
    aggregator: any.
    updates: leaves (clients, ...).
    weights: shape=(clients,), float32.
    seed: of the round's key.
    noise_seed: of its key of private noise.
  """
  run = functools.partial(
    aggregators.aggregate,
    aggregator,
    key=jax.random.key(seed),
    noise_key=jax.random.key(noise_seed),
  )
  return jax.device_get(jax.jit(run)(updates, weights=weights))


def _on_two_shares(
  aggregator: Aggregator, updates: PyTree, weights: np.ndarray
) -> PyTree:
  """Return what `aggregate` does, with the coordinates in two shares."""

  def halves(x: np.ndarray) -> np.ndarray:
    if x.ndim == 1:  # of a scalar parameter: whole on every device
      return x
    flat = x.reshape(len(x), -1)
    even = np.pad(flat, ((0, 0), (0, flat.shape[1] % 2)))
    return np.stack(np.split(even, 2, axis=1))

  def put_together(made: np.ndarray, x: np.ndarray) -> np.ndarray:
    return made.ravel()[: x[0].size].reshape(x.shape[1:])

  run = lambda half: aggregators.aggregate(
    aggregator, half, weights=jnp.asarray(weights), shares=Shares("shares")
  )
  axes = jax.tree.map(lambda x: None if x.ndim == 1 else 0, updates)
  shared = jax.jit(jax.vmap(run, (axes,), axis_name="shares"))
  made = jax.device_get(shared(jax.tree.map(halves, updates)))
  return jax.tree.map(put_together, made, updates)


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
    aggregate(aggregator, updates, weights, seed, seed) for seed in range(3)
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
