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
from fedjax_sim.core.tree import (
  all_finite,
  clipped,
  clipped_by_layer,
  fits,
  length,
)
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.privacy.central import noise
from fedjax_sim.privacy.central.integers import size
from fedjax_sim.privacy.central.settings import Central
from fedjax_sim.privacy.central.worst_case import LARGEST
from fedjax_sim.training.seal import sealed
from fedjax_sim.training.wrappers import wrap_algorithm

LEAST_FACTOR = 1e-6  # that a quantile may multiply the clipping norm by
_TAG = 0x6E6F6973  # of the key: no number that an algorithm would fold in


class Contribution(NamedTuple):
  """What a client sends: parts that are at most 1 long; () is not sent.

  Attributes:
    update: the weighted update over the clipping norm; with discrete noise in
      steps of a grid, int32.
    statistics: `Report.statistics` over their norm.
    weight: shape=(), float32; over the largest weight.
    below: shape=(), float32; twice (whether the update was below the clipping
      norm, minus 1/2).
  """

  update: PyTree
  statistics: PyTree
  weight: PyTree
  below: PyTree


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


def central(algorithm: Algorithm, settings: Central) -> Algorithm:
  """The algorithm, private for its clients.

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
  example = "Central(clip_norm=1.0, noise_multiplier=1.0, denominator=20.0)"
  validate.instance("settings", settings, Central, example)
  _check(algorithm, settings)
  order = 1 if settings.noise == "laplace" else 2
  clip = clipped_by_layer if settings.per_layer else clipped
  of_update, of_extra = settings.multipliers()
  canaries, grid = settings.canaries, settings.grid
  distance = 0.0
  if grid is not None:
    distance = grid.distance(_dimension(algorithm))

  def noisy(multiplier: Array, key: Key, total: PyTree) -> PyTree:
    if settings.noise == "laplace":
      return noise.laplace(multiplier, key, total)
    return noise.noised(None, multiplier, key, (), total)[0]

  def shares(update: PyTree) -> PyTree:
    """A sum as canaries see it: 1 is the longest contribution."""
    return update if grid is None else grid.shares(update)

  def init(server: PyTree, key: Key, hparams: HParams) -> PrivateState:
    report = report_shapes(algorithm, server, hparams)
    _check_report(report, settings)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), report.update)
    return PrivateState(
      server=server,
      noise=noise.init(settings.strategy, zeros),
      clip_factor=jnp.ones((), jnp.float32),
      audit=_audit(key, zeros, report.statistics, hparams),
    )

  def _audit(
    key: Key, like: PyTree, statistics: PyTree, hparams: HParams
  ) -> PyTree:
    if canaries is None:
      return ()
    factor = jnp.ones((), jnp.float32)
    return canaries.init(
      jax.random.fold_in(key, _TAG),
      like,
      canary(statistics, hparams, factor),
      _clip_norm(hparams, factor),
      order,
    )

  def contribution(
    update: PyTree,
    statistics: PyTree,
    weight: Array,
    hparams: HParams,
    factor: Array,
  ) -> tuple[Contribution, Array, Array]:
    """What a client sends; whether its update was below the norm, and is fit.

    Clipping leaves none that is not fit, but for what is not finite: a last
    look at what is released.
    """
    numbers = hparams["privacy"]
    clip_norm = _clip_norm(hparams, factor)
    share = jnp.ones((), jnp.float32)
    if settings.max_weight is not None:
      share = jnp.clip(weight / numbers["max_weight"], 0, 1)
      share = share.astype(jnp.float32)
    update = jax.tree.map(lambda u: share * u, update)
    below = length(update, order) <= clip_norm
    if "statistics" in settings.extras:
      statistics = clipped(statistics, numbers["statistics_norm"], order)
    update = clip(update, clip_norm, order)
    sent = Contribution(
      update=update if grid is None else grid.in_steps(update),
      statistics=statistics,
      weight=share if "weight" in settings.extras else (),
      below=jnp.where(below, 1.0, -1.0) if "below" in settings.extras else (),
    )
    if grid is None:
      fit = jnp.array([fits(part, order) for part in sent]).all()
    else:  # whole numbers cannot be NaN
      fit = all_finite(update) & grid.fits(sent.update)
    return sent, below, fit

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    report = inner(report)
    sent, below, fit = contribution(
      report.update,
      report.statistics,
      report.weight,
      client.hparams,
      client.message.clip_factor,
    )
    one = jnp.ones((), jnp.float32)
    cut = Metric(1 - below.astype(jnp.float32), one)
    return report._replace(
      update=sent,
      weight=jnp.where(fit, one, jnp.nan),  # a round leaves the client out
      statistics=(),
      metrics={**report.metrics, "clipped": cut},
    )

  def canary(
    statistics: PyTree, hparams: HParams, factor: Array
  ) -> Callable[[PyTree], Contribution]:
    """What a canary sends of a raw update, by the code that clients run."""

    def contribute(update: PyTree) -> Contribution:
      nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)
      weight = jnp.asarray(LARGEST, jnp.float32)
      sent = contribution(update, nothing, weight, hparams, factor)[0]
      return sent._replace(update=shares(sent.update))

    return contribute

  def planted(
    state: PrivateState, total: Contribution, context: Context
  ) -> tuple[Contribution, PyTree]:
    """The sum, with the canaries' contributions; and the audit's state."""
    if canaries is None:
      return total, ()
    hparams, factor = context.hparams, state.clip_factor
    # Canaries' whole numbers stay exact as shares: few have a coordinate.
    start = total
    if grid is not None:
      start = total._replace(update=shares(_zeros(total.update)))
    everyone, audit = canaries.plant(
      state.audit,
      context.round,
      start,
      canary(total.statistics, hparams, factor),
      _clip_norm(hparams, factor),
      order,
    )
    if grid is not None:
      update = jax.tree.map(
        lambda t, x: t + jnp.round(x * grid.scale).astype(t.dtype),
        total.update,
        everyone.update,
      )
      everyone = everyone._replace(update=update)
    return everyone, audit

  def observed(
    state: PrivateState,
    audit: PyTree,
    sums: tuple[Contribution, Contribution, PyTree],
    context: Context,
  ) -> PyTree:
    """The audit's state after the sum of clients, of all, and with noise."""
    if canaries is None:
      return ()
    clients, everyone, noisy = sums
    hparams, factor = context.hparams, state.clip_factor
    return canaries.observe(
      audit,
      context.round,
      (shares(clients.update), shares(everyone.update), noisy),
      canary(clients.statistics, hparams, factor),
      _clip_norm(hparams, factor),
    )

  def apply(
    state: PrivateState, aggregate: Aggregate, context: Context
  ) -> PrivateState:
    numbers = context.hparams["privacy"]
    total, audit = planted(state, aggregate.update, context)
    multiplier = numbers["noise_multiplier"] * numbers["noise_scale"]
    keys = [jax.random.fold_in(context.noise_key, i) for i in range(len(total))]
    memory: PyTree = ()
    if grid is not None:
      steps = grid.noised(keys[0], total.update)
      update, seen = grid.in_units(steps), grid.shares(steps)
    elif settings.strategy is None:
      update = noisy(of_update * multiplier, keys[0], total.update)
    else:
      update, memory = noise.noised(
        settings.strategy, multiplier, keys[0], state.noise, total.update
      )
    statistics, weight, below = (
      noisy(of_extra * multiplier, k, part)
      for k, part in zip(keys[1:], total[1:], strict=True)
    )
    count = numbers["denominator"].astype(jnp.float32)
    divisor = jnp.maximum(weight, 1) if "weight" in settings.extras else count
    step = _clip_norm(context.hparams, state.clip_factor) / divisor
    bound = numbers.get("statistics_norm", 0.0)
    server = algorithm.apply(
      state.server,
      Aggregate(
        update=jax.tree.map(lambda x: step * x, update),
        buffers=aggregate.buffers,
        statistics=jax.tree.map(lambda x: bound / count * x, statistics),
        weight=divisor,
        clients=jnp.round(count).astype(jnp.int32),
        members=_nobody(aggregate.members),
      ),
      context,
    )
    sums = (aggregate.update, total, update if grid is None else seen)
    factor = state.clip_factor
    if "below" in settings.extras:
      fraction = (below / count + 1) / 2
      off = fraction - numbers["quantile"]
      factor = factor * jnp.exp(-numbers["quantile_rate"] * off)
      factor = jnp.clip(factor, LEAST_FACTOR, 1 / LEAST_FACTOR)
    return PrivateState(
      server=server,
      noise=memory,
      clip_factor=factor.astype(jnp.float32),
      audit=observed(state, audit, sums, context),
    )

  def state_metrics(state: PrivateState, hparams: HParams) -> dict[str, Array]:
    return {"privacy/clip_norm": _clip_norm(hparams, state.clip_factor)}

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
  audited = canaries and (
    lambda state: canaries.evidence(state.audit, of_update)
  )
  default = Algorithm._field_defaults["postprocess_report"]
  privacy = settings.release._replace(
    audited=audited,
    distance=distance,
    checks_updates=algorithm.postprocess_report is default,
  )
  return sealed(private._replace(draws_noise=True, log_weight=None), privacy)


def _zeros(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.zeros_like, tree)


def _dimension(algorithm: Algorithm) -> int:
  """How many numbers an update has; nothing is run."""
  server = jax.eval_shape(
    algorithm.init, jax.random.key(0), dict(algorithm.hparams)
  )
  report = report_shapes(algorithm, server, algorithm.hparams)
  return size(report.update)


def _clip_norm(hparams: HParams, factor: Array) -> Array:
  norm: Array = hparams["privacy"]["clip_norm"] * factor
  return norm.astype(jnp.float32)


def _nobody(members: Members) -> Members:
  """No client in any slot."""
  empty: Members = jax.tree.map(jnp.zeros_like, members)
  return empty._replace(id=jnp.full_like(members.id, -1))


def _check(algorithm: Algorithm, settings: Central) -> None:
  """Refuses an algorithm that has to see its clients."""
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
  if algorithm.requirements.pools_data:
    raise ValueError(
      "privacy.mechanism protects clients, and algorithm.name pools the data"
      " of all; take another one of the two."
    )
  if algorithm.log_weight is not None and settings.max_weight is None:
    raise ValueError(
      "algorithm.name weighs clients by their data, without a bound; set"
      " privacy.max_weight to bound the weights, or let all weigh the same by"
      " algorithm.weighting='uniform'."
    )


def _check_report(report: Report, settings: Central) -> None:
  """Refuses reports of which more would be released than the noisy sum."""
  if jax.tree.leaves(report.buffers):
    raise ValueError(
      "privacy.mechanism: the model has buffers, such as batch statistics,"
      " whose mean over clients would be released without noise; take a model"
      " without, such as one with group norm, or freeze them."
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
