"""Central differential privacy: a trusted server adds noise to a sum.

Every client's weighted update is clipped, the round sums what clients send, and
the server adds noise to the sum, divides by a number that is known beforehand,
and takes the step of the algorithm inside (McMahan et al. 2018, "Learning
differentially private recurrent language models", arXiv 1710.06963). What the
algorithm learns of a round's clients is that noisy mean alone, so whatever it
does with it is private, too.

Clipping may follow a quantile of the updates' norms (Andrew et al. 2021,
"Differentially private learning with adaptive clipping", arXiv 1905.03871).
Contributions and noise may be whole numbers (`integers`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  HParams,
  Key,
  Members,
  Metric,
  PyTree,
  Report,
  validate,
)
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.privacy.central import noise, planting
from fedjax_sim.privacy.central.contribution import (
  Contribution,
  clip_norm,
  contribute,
)
from fedjax_sim.privacy.central.integers import size
from fedjax_sim.privacy.central.settings import CentralDPConfig
from fedjax_sim.training.seal import sealed
from fedjax_sim.training.wrappers import wrap_algorithm

LEAST_FACTOR = 1e-6  # that a quantile may multiply the clipping norm by
_TAG = 0x6E6F6973  # of the key: no number that an algorithm would fold in


class PrivateState(NamedTuple):
  """A server, and what the noise and the clipping keep."""

  server: PyTree
  noise: PyTree  # what correlated noise remembers
  clip_factor: Array  # shape=(), float32; the quantile's, of the clipping norm
  audit: PyTree  # an `AuditState`, or ()


class Message(NamedTuple):
  """What the server sends to every client."""

  inner: PyTree
  clip_factor: Array


class _Noisy(NamedTuple):
  """The sum of a round's contributions, with noise; () is not released.

  Attributes:
    update: 1 is the clipping norm.
    shares: the same as canaries see it: 1 is the longest update.
    statistics: 1 is their norm.
    weight: shape=(), float32; 1 is the largest weight.
    below: shape=(), float32; as in `Contribution`.
  """

  update: PyTree
  shares: PyTree
  statistics: PyTree
  weight: PyTree
  below: PyTree


def with_central_dp(
  algorithm: Algorithm, settings: CentralDPConfig
) -> Algorithm:
  """Return the algorithm with central differential privacy.

  The noise of a round is a function of the run's noise seed and the round
  alone, and the same on every device. But for `discrete_gaussian` it is
  floating-point noise (`draws`): right for a simulation, not for data that need
  protection.

  Args:
    algorithm: one that takes a mean; it gets a noisy one, and learns neither
      how many clients there were nor which.
    settings: what is clipped, and how much noise there is.

  Raises:
    ValueError: the algorithm needs to know more of its clients.
  """
  example = (
    "CentralDPConfig(clip_norm=1.0, noise_multiplier=1.0, denominator=20.0)"
  )
  validate.instance("settings", settings, CentralDPConfig, example)
  _check(algorithm, settings)
  distance = 0.0
  if settings.grid is not None:
    distance = settings.grid.distance(_dimension(algorithm))

  def init(server: PyTree, key: Key, hparams: HParams) -> PrivateState:
    report = report_shapes(algorithm, server, hparams)
    _check_report(report, settings)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), report.update)
    own = jax.random.fold_in(key, _TAG)
    return PrivateState(
      server=server,
      noise=noise.init(settings.strategy, zeros),
      clip_factor=jnp.ones((), jnp.float32),
      audit=planting.init(settings, own, zeros, report.statistics, hparams),
    )

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    report = inner(report)
    sent = contribute(
      settings,
      report.update,
      report.statistics,
      report.weight,
      client.hparams,
      client.message.clip_factor,
    )
    one = jnp.ones((), jnp.float32)
    cut = Metric(1 - sent.below.astype(jnp.float32), one)
    return report._replace(
      update=sent.contribution,
      weight=jnp.where(sent.fit, one, jnp.nan),  # a round leaves the client out
      statistics=(),
      metrics={**report.metrics, "clipped": cut},
    )

  def apply(
    state: PrivateState, aggregate: Aggregate, context: Context
  ) -> PrivateState:
    clients, factor = aggregate.update, state.clip_factor
    everyone, audit = planting.plant(
      settings, state.audit, clients, factor, context
    )
    noisy, memory = _with_noise(settings, everyone, state.noise, context)
    mean = _mean(settings, noisy, aggregate, factor, context.hparams)
    return PrivateState(
      server=algorithm.apply(state.server, mean, context),
      noise=memory,
      clip_factor=_next_factor(settings, noisy, factor, context.hparams),
      audit=planting.observe(
        settings, audit, clients, everyone, noisy.shares, factor, context
      ),
    )

  def state_metrics(state: PrivateState, hparams: HParams) -> dict[str, Array]:
    return {"privacy/clip_norm": clip_norm(hparams, state.clip_factor)}

  private = wrap_algorithm(
    algorithm,
    init=init,
    message=lambda state, inner: Message(inner, state.clip_factor),
    postprocess_report=postprocess_report,
    apply=apply,
    state_metrics=state_metrics,
    hparams={"privacy": settings.hparams},
    requirements=algorithm.requirements._replace(weighted_mean=True),
  )
  canaries, (multiplier, _) = settings.canaries, settings.multipliers()
  audited = canaries and (
    lambda state: canaries.evidence(state.audit, multiplier)
  )
  default = Algorithm._field_defaults["postprocess_report"]
  privacy = settings.release._replace(
    audited=audited,
    distance=distance,
    checks_updates=algorithm.postprocess_report is default,
  )
  return sealed(private._replace(draws_noise=True, log_weight=None), privacy)


def _with_noise(
  settings: CentralDPConfig,
  total: Contribution,
  memory: PyTree,
  context: Context,
) -> tuple[_Noisy, PyTree]:
  """Add a round's noise to the sum.

  Args:
    settings: how much noise, and which.
    total: the sum of all contributions.
    memory: `PrivateState.noise`.
    context: of the round; its noise key is used.

  Returns:
    The noisy sum, and the memory for the next round.
  """
  numbers, grid = context.hparams["privacy"], settings.grid
  of_update, of_extra = settings.multipliers()
  multiplier = numbers["noise_multiplier"] * numbers["noise_scale"]
  keys = [jax.random.fold_in(context.noise_key, i) for i in range(len(total))]
  if grid is not None:
    steps = grid.noised(keys[0], total.update)
    update, shares, memory = grid.in_units(steps), grid.shares(steps), ()
  elif settings.strategy is None:
    update = _independent(
      settings, of_update * multiplier, keys[0], total.update
    )
    shares, memory = update, ()
  else:
    update, memory = noise.noised(
      settings.strategy, multiplier, keys[0], memory, total.update
    )
    shares = update
  extras = (
    _independent(settings, of_extra * multiplier, key, part)
    for key, part in zip(keys[1:], total[1:], strict=True)
  )
  return _Noisy(update, shares, *extras), memory


def _independent(
  settings: CentralDPConfig, multiplier: Array, key: Key, total: PyTree
) -> PyTree:
  """Return the sum with noise that is new in every round."""
  if settings.noise == "laplace":
    return noise.laplace(multiplier, key, total)
  return noise.noised(None, multiplier, key, (), total)[0]


def _mean(
  settings: CentralDPConfig,
  noisy: _Noisy,
  aggregate: Aggregate,
  factor: Array,
  hparams: HParams,
) -> Aggregate:
  """Return all that the algorithm inside learns of a round's clients.

  Args:
    settings: what is released.
    noisy: the noisy sum.
    aggregate: the round's, which gives shapes alone, and buffers.
    factor: shape=(), float32; `PrivateState.clip_factor`.
    hparams: the run's.
  """
  numbers = hparams["privacy"]
  count = numbers["denominator"].astype(jnp.float32)
  divisor = count
  if "weight" in settings.extras:
    divisor = jnp.maximum(noisy.weight, 1)
  step = clip_norm(hparams, factor) / divisor
  bound = numbers.get("statistics_norm", 0.0)
  return Aggregate(
    update=jax.tree.map(lambda x: step * x, noisy.update),
    buffers=aggregate.buffers,
    statistics=jax.tree.map(lambda x: bound / count * x, noisy.statistics),
    weight=divisor,
    clients=jnp.round(count).astype(jnp.int32),
    members=_nobody(aggregate.members),
  )


def _next_factor(
  settings: CentralDPConfig, noisy: _Noisy, factor: Array, hparams: HParams
) -> Array:
  """Return the clipping norm's factor after a round; shape=(), float32.

  It follows a quantile of the norms (arXiv 1905.03871, section 2.2).
  """
  numbers = hparams["privacy"]
  if "below" in settings.extras:
    count = numbers["denominator"].astype(jnp.float32)
    fraction = (noisy.below / count + 1) / 2
    off = fraction - numbers["quantile"]
    factor = factor * jnp.exp(-numbers["quantile_rate"] * off)
    factor = jnp.clip(factor, LEAST_FACTOR, 1 / LEAST_FACTOR)
  return factor.astype(jnp.float32)


def _dimension(algorithm: Algorithm) -> int:
  """Return how many numbers an update has; nothing is run."""
  server = jax.eval_shape(
    algorithm.init, jax.random.key(0), dict(algorithm.hparams)
  )
  report = report_shapes(algorithm, server, algorithm.hparams)
  return size(report.update)


def _nobody(members: Members) -> Members:
  """Return members with no client in any slot."""
  empty: Members = jax.tree.map(jnp.zeros_like, members)
  return empty._replace(id=jnp.full_like(members.id, -1))


def _check(algorithm: Algorithm, settings: CentralDPConfig) -> None:
  """Refuse an algorithm that a noisy sum cannot make private."""
  if algorithm.privacy is not None:
    raise ValueError("The algorithm is private already; wrap it once.")
  if "stale_probability" in algorithm.hparams:
    raise ValueError(
      "server.stale_probability: a late report can meet its client's next one"
      " in a sum, of which privacy.mechanism does not know; unset one of them."
    )
  if algorithm.requirements.all_updates:
    raise ValueError(
      "privacy.mechanism adds noise to a sum of updates, and algorithm.name"
      " wants every client's update by itself; take another one of the two."
    )
  if algorithm.requirements.groups > 1:
    raise ValueError(
      "privacy.mechanism adds noise to one sum of updates, and algorithm.name"
      " has several groups of clients, each with a sum of its own; take another"
      " one of the two."
    )
  if algorithm.requirements.client_values:
    raise ValueError(
      "privacy.mechanism adds noise to a sum of updates, and algorithm.name"
      " wants numbers of every client by itself, such as its loss; take another"
      " one of the two."
    )
  if algorithm.requirements.pools_data:
    raise ValueError(
      "privacy.mechanism protects clients, and algorithm.name pools the data"
      " of all; take another one of the two."
    )
  if algorithm.survey is not None:
    raise ValueError(
      "privacy.mechanism adds noise to a sum of updates, and algorithm.name has"
      " clients answer a survey first, whose mean would be released without;"
      " take another one of the two."
    )
  if algorithm.log_weight is not None and settings.max_weight is None:
    raise ValueError(
      "algorithm.name weighs clients by their data, without a bound; set"
      " privacy.max_weight to bound the weights, or let all weigh the same by"
      " algorithm.weighting='uniform'."
    )


def _check_report(report: Report, settings: CentralDPConfig) -> None:
  """Refuse reports of which more would be released than the noisy sum."""
  if jax.tree.leaves(report.buffers):
    raise ValueError(
      "privacy.mechanism: the model has buffers, such as batch statistics or a"
      " mixture's weights, whose mean over clients would be released without"
      " noise; take a model without, such as one with group norm, or keep batch"
      " statistics as they begin by model.send_buffers=False."
    )
  some = bool(jax.tree.leaves(report.statistics))
  if some != (settings.statistics_norm is not None):
    raise ValueError(
      "privacy.mechanism: algorithm.name lets clients report statistics, which"
      " would be released without noise; set privacy.statistics_norm to clip"
      " them, and noise is added."
      if some
      else f"privacy.statistics_norm={settings.statistics_norm}: algorithm.name"
      " lets clients report no statistics; unset it."
    )
