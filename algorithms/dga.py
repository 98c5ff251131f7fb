"""DGA: clients with a low training loss, or small gradients, count more.

Dimitriadis et al. 2021, "Dynamic gradient aggregation for federated domain
adaptation" (arXiv 2106.07578): the server's optimizer takes the mean of the
clients' pseudo-gradients, weighted by softmax(-beta s), where s is a client's
training loss, or the variance, mean or magnitude of its pseudo-gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  HParams,
  Key,
  Metric,
  PyTree,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.engine.client_log import gradient_statistics
from fedjax_sim.training.local import LocalState, Observer, mean_of, metric
from fedjax_sim.training.optimizers import Optimizer

STATISTICS = ("loss", "variance", "mean", "magnitude")
STATISTICS_OF = ("update", "batches")
MOST_EXPONENT = 60.0  # float32 ends at 88, and weights are summed


class DGAState(NamedTuple):
  """FedAvg's server state, and the reference r of the softmax."""

  fedavg: ServerState
  reference: PyTree  # shape=(), float32; last round's weighted mean of s, or ()


class Message(NamedTuple):
  """What a client receives."""

  variables: Variables
  reference: PyTree  # as in `DGAState`


def dga(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str = "softmax",
  statistic: str = "loss",
  statistic_of: str = "update",
  beta: float | None = None,
  reference: float | None = None,
) -> Algorithm:
  """Return FedAvg whose clients are weighted by softmax(-beta s).

  A client does not know the s of the others, so its weight is
  exp(-beta (s - r)), with r from the round before; the mean's denominator
  cancels r. Exponents are limited to [-60, 60], which matters most in the first
  round, where r is 0.

  Clients send s, from which the server computes r. With a fixed r they send
  only an update and a weight, which local privacy covers, and central privacy
  with a bound on the weight.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    server_optimizer: takes the negative mean update as a gradient.
    weighting: `softmax`, or `uniform`, where all clients count the same.
    statistic: s: the mean training `loss` over the local steps, or the
      `variance`, `mean` or `magnitude` of the pseudo-gradient.
    statistic_of: `update`: s as above. `batches`: s as FLUTE's code has it: the
      sum of the local steps' mean losses over the sum of the loss's weights,
      such as examples; or the statistic of all entries of all gradients of
      the round, clipped if `max_grad_norm` clips them.
    beta: sharpness of the softmax; None: 1 with `softmax`. 0 is the plain mean;
      negative values prefer a large s.
    reference: a fixed r, the s of a client of weight 1; FLUTE's is 0. None: r
      is the previous round's weighted mean of s.

  Raises:
    TypeError, ValueError: an argument is none of these.
  """
  validate.one_of("weighting", weighting, ("softmax", "uniform"))
  validate.one_of("statistic", statistic, STATISTICS)
  validate.one_of("statistic_of", statistic_of, STATISTICS_OF)
  softmax = weighting == "softmax"
  for name, value in (("beta", beta), ("reference", reference)):
    if not softmax and value is not None:
      raise ValueError(
        f"{name}={value} does not go with"
        " weighting='uniform'; unset one of them."
      )
  numbers = {}
  if softmax:
    sharpness = 1.0 if beta is None else beta
    numbers["beta"] = validate.number("beta", sharpness)
  if reference is not None:
    numbers["reference"] = validate.number("reference", reference)
  follows = softmax and reference is None
  base = fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting="uniform",
    get_model=lambda client: client.message.variables,
    observer=_OF_BATCHES if statistic_of == "batches" else None,
  )

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    values = {
      "loss": training_loss(carry),
      **gradient_statistics(report.update),
    }
    report = report._replace(values=values)
    if not softmax:
      return report
    if statistic_of == "batches":
      values = batch_statistics(carry)
    s = values[statistic]
    number = lambda name: client.hparams[name].astype(s.dtype)
    r = client.message.reference if follows else number("reference")
    exponent = -number("beta") * (s - r)
    exponent = jnp.clip(exponent, -MOST_EXPONENT, MOST_EXPONENT)
    return report._replace(
      weight=jnp.exp(exponent), statistics=s if follows else ()
    )

  def init(key: Key, hparams: HParams) -> DGAState:
    r = jnp.zeros((), jnp.float32) if follows else ()
    return DGAState(base.init(key, hparams), r)

  def apply(
    server: DGAState, aggregate: Aggregate, context: Context
  ) -> DGAState:
    r = server.reference
    if follows:
      r = aggregate.statistics.astype(r.dtype)
    return DGAState(base.apply(server.fedavg, aggregate, context), r)

  def log_weight(server: DGAState, hparams: HParams) -> Array:
    r = server.reference if follows else hparams["reference"]
    return -hparams["beta"] * r

  return base._replace(
    init=init,
    broadcast=lambda server: Message(server.fedavg.variables, server.reference),
    finish=finish,
    apply=apply,
    variables=lambda server: server.fedavg.variables,
    with_model=lambda server, variables: server._replace(
      fedavg=server.fedavg._replace(variables=variables)
    ),
    hparams={**base.hparams, **numbers},
    log_weight=log_weight if softmax else None,
  )


def training_loss(carry: LocalState) -> Array:
  """Return the mean loss over a client's local steps, shape=(); 0 if none."""
  return mean_of(carry.loss)


class BatchSums(NamedTuple):
  """Sums over a client's local steps; all shape=(), float32."""

  loss: PyTree  # of the batches' mean losses
  entries: PyTree  # of all gradients
  gradient: PyTree
  squares: PyTree


def _batch_sums(client: Client, gradient: PyTree, loss: Metric) -> BatchSums:
  """Return what a local step adds to the sums."""
  leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(gradient)]
  total = sum(jnp.sum(x) for x in leaves)
  squares = sum(jnp.sum(x**2) for x in leaves)
  if "max_grad_norm" in client.hparams["client"]:
    most = client.hparams["client"]["max_grad_norm"].astype(jnp.float32)
    norm = jnp.sqrt(squares)
    scale = jnp.minimum(1, most / jnp.where(norm > 0, norm, 1))
    total, squares = scale * total, scale**2 * squares
  seen = loss.weight > 0
  return BatchSums(
    loss.total / jnp.where(seen, loss.weight, 1),
    jnp.where(seen, jnp.float32(sum(x.size for x in leaves)), 0),
    total,
    squares,
  )


_OF_BATCHES = Observer(
  zero=BatchSums(*[jax.ShapeDtypeStruct((), jnp.float32)] * 4),
  term=_batch_sums,
)


def batch_statistics(carry: LocalState) -> dict[str, Array]:
  """Return s over a client's batches, by name; shape=(), 0 without steps."""
  sums: BatchSums = compensated.rounded(carry.observed)
  weight = metric(carry.loss).weight
  entries = jnp.where(sums.entries > 0, sums.entries, 1)
  mean, square = sums.gradient / entries, sums.squares / entries
  return {
    "loss": sums.loss / jnp.where(weight > 0, weight, 1),
    "mean": mean,
    "magnitude": jnp.sqrt(square),
    "variance": jnp.maximum(square - mean**2, 0),
  }
