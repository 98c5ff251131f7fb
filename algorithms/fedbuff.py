"""FedBuff: asynchronous clients whose updates the server buffers.

Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation"
(arXiv 2106.06639), algorithm 1. A round is one server step: its cohort are the
K clients whose updates fill the buffer. A client that downloaded the model tau
steps ago sends the update from that version, discounted by

    s(tau) = 1 / sqrt(1 + tau)

and the server takes the step w <- w + eta_g / K sum_i s(tau_i) Delta_i.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms import fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  HParams,
  Key,
  PyTree,
  Report,
  Task,
  Variables,
  validate,
)
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer


class ServerState(NamedTuple):
  """FedAvg's state, and the models of the rounds before.

  Attributes:
    fedavg: with the newest model.
    past: (params, buffers), leaves (versions - 1, ...); the latest first.
  """

  fedavg: fedavg.ServerState
  past: tuple[PyTree, PyTree]


def fedbuff(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  versions: int = 2,
) -> Algorithm:
  """Return FedAvg whose clients may train from older versions of the model.

  The sampler chooses who holds which version, see `sampling.in_flight`; with
  any other all hold the newest, which is FedAvg. All clients count the same.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    server_optimizer: sgd; its learning rate is eta_g.
    versions: how many models are in flight, the newest included, 2 to 1000. A
      client that would hold an older one holds the oldest of them.

  Raises:
    TypeError, ValueError: versions is not such a number.
  """
  versions = validate.integer("versions", versions, ge=2, le=1000)
  base = fedavg.fedavg(
    task, client_optimizer, server_optimizer, weighting="uniform"
  )

  def staleness(version: Array) -> Array:
    return jnp.minimum(version, versions - 1)

  def init(key: Key, hparams: HParams) -> ServerState:
    server = base.init(key, hparams)
    repeated = jax.tree.map(
      lambda x: jnp.repeat(x[None], versions - 1, axis=0),
      (server.variables.params, server.variables.buffers),
    )
    return ServerState(server, repeated)

  def broadcast(server: ServerState) -> Variables:
    params, buffers, frozen = server.fedavg.variables
    params, buffers = jax.tree.map(
      lambda new, past: jnp.concatenate([new[None], past]),
      (params, buffers),
      server.past,
    )
    return Variables(params, buffers, frozen)

  def download(message: Variables, version: Array, ident: Array) -> Variables:
    del ident
    params, buffers = jax.tree.map(
      lambda x: x[staleness(version)], (message.params, message.buffers)
    )
    return message._replace(params=params, buffers=buffers)

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    discount = 1 / jnp.sqrt(1.0 + staleness(client.version))
    return report._replace(
      update=jax.tree.map(lambda u: discount.astype(u.dtype) * u, report.update)
    )

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    params, buffers, _ = broadcast(server)
    past = jax.tree.map(lambda x: x[:-1], (params, buffers))
    return ServerState(base.apply(server.fedavg, aggregate, context), past)

  return base._replace(
    init=init,
    broadcast=broadcast,
    download=download,
    finish=finish,
    apply=apply,
    variables=lambda server: server.fedavg.variables,
    with_model=lambda server, variables: server._replace(
      fedavg=server.fedavg._replace(variables=variables)
    ),
  )
