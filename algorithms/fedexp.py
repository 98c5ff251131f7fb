"""FedExP: FedAvg whose server steps are longer the less the clients agree.

Jhunjhunwala et al. 2023, "FedExP: Speeding up federated averaging via
extrapolation" (arXiv 2301.09604), algorithm 1: with the updates Delta_i of M
clients and their mean Delta, the server's step is Delta times

    eta_g = max(1, sum_i ||Delta_i||^2 / (2 M (||Delta||^2 + epsilon)))

The paper evaluates the mean of the last two models, this the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  PyTree,
  Report,
  Requirements,
  Task,
  validate,
)
from fedjax_sim.core.tree import tree_norm
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer
from fedjax_sim.training.wrappers import wrap_algorithm


class ServerState(NamedTuple):
  """FedAvg's state, and the length of the last step."""

  server: PyTree
  eta_g: Array  # shape=(), float32; 1 before the first round


def fedexp(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  epsilon: float = 0.001,
) -> Algorithm:
  """Return FedAvg whose server extrapolates.

  All clients count the same, as in the paper. Besides their updates clients
  send the squared norms of these, as transforms leave them, of which the server
  needs the mean: a statistic, which a private run has to bound by
  `privacy.statistics_norm`. The metric `eta_g` is that of the round before.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    server_optimizer: sgd with learning rate 1 is the paper's.
    epsilon: bounds the step where the clients' updates cancel out, > 0.

  Raises:
    TypeError, ValueError: epsilon is not such a number.
  """
  epsilon = validate.number("epsilon", epsilon, gt=0)
  base = fedavg(task, client_optimizer, server_optimizer, weighting="uniform")

  def with_square(report: Report) -> Report:
    return report._replace(statistics=tree_norm(report.update) ** 2)

  def finish(client: Client, carry: LocalState) -> Report:
    return with_square(base.finish(client, carry))

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    """Take the norm of what is sent, which transforms may have shortened."""
    return with_square(inner(report))

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    square = tree_norm(aggregate.update) ** 2 + context.hparams["epsilon"]
    eta_g = jnp.maximum(1, aggregate.statistics / (2 * square))
    update = jax.tree.map(lambda u: eta_g.astype(u.dtype) * u, aggregate.update)
    moved = base.apply(
      server.server, aggregate._replace(update=update), context
    )
    return ServerState(moved, eta_g.astype(server.eta_g.dtype))

  return wrap_algorithm(
    base,
    init=lambda server, key, hparams: ServerState(
      server, jnp.ones((), jnp.float32)
    ),
    finish=finish,
    postprocess_report=postprocess_report,
    apply=apply,
    hparams={"epsilon": epsilon},
    # The norms are those of a mean; a secure or robust aggregator that hides
    # or drops updates would not hide or drop their squared norms.
    requirements=Requirements(weighted_mean=True),
    state_metrics=lambda server, hparams: {"eta_g": server.eta_g},
  )
