"""Hierarchical federated averaging: edge servers between clients and a cloud.

Liu et al. 2020, "Client-edge-cloud hierarchical federated learning" (arXiv
1905.06641), algorithm 1 (HierFAVG). Every edge server l has a model w_l, which
its own clients train from and whose updates it averages in every round (after
kappa_1 local steps); in every kappa_2-th round the cloud averages the edges,

    w_l <- w = sum_l D_l w_l / sum_l D_l

where D_l is the weight of the clients that have trained at edge l since the
cloud's last average.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.aggregators import Grouped
from fedjax_sim.algorithms.fedavg import fedavg
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
  Requirements,
  Task,
  Variables,
  validate,
)
from fedjax_sim.core.tree import in_dtype, tree_where
from fedjax_sim.training import several_models
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer, optimizer


class ServerState(NamedTuple):
  """The models of the edges, and the cloud's.

  Attributes:
    cloud: what the cloud's average would be now.
    edges: (parameters, buffers), leaves (edges, ...).
    weight: shape=(edges,), float32; D_l.
    round: shape=(), int32; rounds since the beginning.
  """

  cloud: Variables
  edges: PyTree
  weight: Array
  round: Array


def hierarchical(
  task: Task,
  client_optimizer: Optimizer,
  num_clients: int,
  *,
  edges: int = 4,
  cloud_every: int = 5,
  assignment: str = "blocks",
  weighting: str = "examples",
) -> Algorithm:
  """Return federated averaging with edge servers.

  The global model, which evaluations see, is the mean of the edges' models by
  their weights; evaluation per client uses its edge's. `bytes_up` and
  `bytes_down` are between clients and edges; the metric `cloud_bytes` is what
  edges and cloud exchange in a round, in both directions.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    num_clients: number of clients; a config knows it.
    edges: number of edge servers.
    cloud_every: kappa_2, rounds between two averages of the cloud.
    assignment: `blocks` gives each edge consecutive clients, as many as the
      others; `interleaved` gives client i to edge i modulo `edges`.
    weighting: a client's weight at its edge, as in `fedavg`.

  Raises:
    TypeError, ValueError: an argument is out of range.
  """
  count = validate.integer("num_clients", num_clients, ge=1)
  edges = validate.integer("edges", edges, ge=2, le=count)
  cloud_every = validate.integer("cloud_every", cloud_every, ge=1)
  validate.one_of("assignment", assignment, ("blocks", "interleaved"))
  ids = np.arange(count)
  blocks = ids * edges // count
  edge_of = np.int32(blocks if assignment == "blocks" else ids % edges)
  base = fedavg(
    task,
    client_optimizer,
    optimizer("sgd", learning_rate=1.0),
    weighting=weighting,
  )

  def edge(ident: Array) -> Array:
    return jnp.asarray(edge_of)[ident]

  def everywhere(variables: Variables) -> PyTree:
    return several_models.repeated(variables, edges)

  def init(key: Key, hparams: HParams) -> ServerState:
    cloud = task.init(key)
    weight = jnp.zeros((edges,), jnp.float32)
    return ServerState(cloud, everywhere(cloud), weight, jnp.int32(0))

  def download(message: ServerState, version: Array, ident: Array) -> Variables:
    del version
    own = edge(ident)
    return several_models.chosen(message.edges, own, message.cloud.frozen)

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    return several_models.report_with_buffers(report, client, carry)

  def postprocess_report(client: Client, report: Report) -> Report:
    return report._replace(update=Grouped(report.update, edge(client.id)))

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    if context.num_clients != count:
      raise ValueError(
        f"num_clients={count}, and the run has {context.num_clients:,} clients;"
        " give as many."
      )
    update, trained = aggregate.update
    moved = jax.tree.map(
      lambda x, u: in_dtype(x.astype(u.dtype) + u, x.dtype),
      server.edges,
      update,
    )
    weight = server.weight + trained
    cloud = several_models.mean(moved, weight, server.cloud.frozen)
    done = server.round + 1
    averages = done % cloud_every == 0
    return ServerState(
      cloud,
      tree_where(averages, everywhere(cloud), moved),
      jnp.where(averages, 0, weight),
      done,
    )

  def cloud_bytes(server: ServerState, hparams: HParams) -> dict[str, Array]:
    del hparams
    size = sum(x.nbytes for x in jax.tree.leaves(server.edges))
    averages = (server.round + 1) % cloud_every == 0
    return {"cloud_bytes": jnp.where(averages, 2.0 * size, 0.0)}

  return Algorithm(
    init=init,
    broadcast=lambda server: server,
    download=download,
    passes=base.passes,
    finish=finish,
    postprocess_report=postprocess_report,
    apply=apply,
    variables=lambda server: server.cloud,
    with_model=lambda server, variables: server._replace(
      cloud=variables,
      edges=everywhere(variables),
      weight=jnp.zeros_like(server.weight),
    ),
    personal=lambda message, state: message,
    hparams={"client": client_optimizer.hparams},
    requirements=Requirements(groups=edges),
    state_metrics=cloud_bytes,
  )
