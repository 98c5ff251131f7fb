"""Gossip: no server, clients mix their models with those of their neighbors.

Koloskova et al. 2020, "A unified theory of decentralized SGD with changing
topology and local updates" (arXiv 2003.10422), algorithm 1, of which D-PSGD
(Lian et al. 2017, arXiv 1705.09056) is the case of one local step. Client i
trains its own model x_i, and takes a mean with its neighbors' by the weights of
a mixing matrix W:

    y_i <- x_i after local steps on f_i,    x_i <- sum_j W_ij y_j
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
from fedjax_sim.core.tree import accumulator_dtype, in_dtype
from fedjax_sim.training import several_models, topologies
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer, optimizer


class ServerState(NamedTuple):
  """All clients' models, which in truth nobody has together.

  Attributes:
    mean: their mean.
    nodes: (parameters, buffers), leaves (clients, ...).
  """

  mean: Variables
  nodes: PyTree


def gossip(
  task: Task,
  client_optimizer: Optimizer,
  num_clients: int,
  *,
  topology: str = "ring",
  degree: int = 4,
  graph_seed: int = 0,
  mixings: int = 1,
) -> Algorithm:
  """Return decentralized training over a fixed graph.

  The global model, which evaluations see, is the mean of all clients' models;
  evaluation per client uses each one's own. Clients that are not in a round's
  cohort mix without training. The metric `consensus` is the root mean square
  distance of the clients' models from their mean, before the round. Devices
  hold the models of all clients, and W as a dense matrix. A round in which no
  client trains is left out, mixing included.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    num_clients: number of clients; a config knows it.
    topology: `ring`, `torus`, `complete`, `random_regular`, or a file with a
      mixing matrix (`.npy`, `.csv`, `.txt`) or with edges (`.edges`).
    degree: number of neighbors in `random_regular`.
    graph_seed: draws `random_regular`.
    mixings: how many times clients mix in a round; bytes count them all.

  Raises:
    ValueError: no such topology, or a matrix that does not lead to the mean.
  """
  count = validate.integer("num_clients", num_clients, ge=1)
  mixings = validate.integer("mixings", mixings, ge=1, le=1000)
  graph_seed = validate.integer("graph_seed", graph_seed, ge=0)
  weights = topologies.mixing_matrix(
    topology, count, degree=degree, seed=graph_seed
  )
  mix = np.linalg.matrix_power(weights, mixings)
  base = fedavg(task, client_optimizer, optimizer("sgd", learning_rate=1.0))

  def init(key: Key, hparams: HParams) -> ServerState:
    return everywhere(task.init(key))

  def everywhere(variables: Variables) -> ServerState:
    return ServerState(variables, several_models.repeated(variables, count))

  def download(message: ServerState, version: Array, ident: Array) -> Variables:
    del version
    return several_models.chosen(message.nodes, ident, message.mean.frozen)

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    return several_models.report_with_buffers(report, client, carry)

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    if context.num_clients != count:
      raise ValueError(
        f"num_clients={count}, and the run has {context.num_clients:,} clients;"
        " give as many."
      )
    members = aggregate.members
    # No id is `count`, so what is absent is dropped.
    place = jnp.where(members.present, members.id, count)

    def mixed(x: Array, updates: Array) -> Array:
      dtype = accumulator_dtype(x)
      y = x.astype(dtype).at[place].add(updates.astype(dtype), mode="drop")
      return in_dtype(jnp.tensordot(jnp.asarray(mix, dtype), y, 1), x.dtype)

    nodes = jax.tree.map(mixed, server.nodes, aggregate.update)
    alike = jnp.ones((count,), jnp.float32)
    mean = several_models.mean(nodes, alike, server.mean.frozen)
    return ServerState(mean, nodes)

  return Algorithm(
    init=init,
    broadcast=lambda server: server,
    download=download,
    passes=base.passes,
    finish=finish,
    apply=apply,
    variables=lambda server: server.mean,
    with_model=lambda server, variables: everywhere(variables),
    personal=lambda message, state: message,
    hparams={"client": client_optimizer.hparams},
    requirements=Requirements(all_updates=True),
    state_metrics=lambda server, hparams: {"consensus": consensus(server)},
    links=mixings * topologies.mean_degree(weights),
  )


def consensus(server: ServerState) -> Array:
  """Return the RMS distance of parameters from their mean, shape=()."""
  params, _ = server.nodes

  def squares(x: Array) -> Array:
    x = x.astype(accumulator_dtype(x))
    return jnp.sum((x - x.mean(0, keepdims=True)) ** 2) / len(x)

  total = sum(map(squares, jax.tree.leaves(params)), jnp.float32(0))
  return jnp.sqrt(total)
