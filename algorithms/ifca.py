"""IFCA: several models, and every client trains the one that fits it best.

Ghosh et al. 2020, "An efficient framework for clustered federated learning"
(arXiv 2006.04088), algorithm 1, with option II, model averaging, and option I,
gradient averaging; the first is HypCluster of Mansour et al. 2020, "Three
approaches for personalization with applications to federated learning" (arXiv
2002.10619). The server sends k models theta_j. Client i finds its cluster,

    j_i = argmin_j F_i(theta_j)

and trains theta_{j_i} to theta~_i, or takes the gradient g_i of F_i there:

    II   theta_j <- mean of theta~_i over the clients i of cluster j
    I    theta_j <- theta_j - gamma (sum of g_i over the same) / m

where m is the size of the cohort. A model that nobody chose stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim import core
from fedjax_sim.algorithms import fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Batch,
  Client,
  Context,
  HParams,
  Key,
  Metric,
  Pass,
  PyTree,
  Report,
  Requirements,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.training.local import (
  Following,
  following,
  full_gradient,
  metric,
)
from fedjax_sim.training.optimizers import Optimizer

MOST_CLUSTERS = 1000  # each is a model, which every client evaluates


class ServerState(NamedTuple):
  """The models, and how many clients chose each.

  Attributes:
    fedavg: FedAvg's state; its parameters and buffers have leaves (k, ...).
    shares: shape=(k,), float32; of the last cohort's clients, by model.
  """

  fedavg: fedavg.ServerState
  shares: Array


class Message(NamedTuple):
  """What the server sends.

  Attributes:
    models: parameters and buffers have leaves (k, ...).
    usual: shape=(), int32; the model that most clients chose last.
  """

  models: Variables
  usual: Array


class Own(NamedTuple):
  """What a client keeps.

  Attributes:
    cluster: shape=(), int32; the model that it chose last.
    trained: shape=(), bool; whether it ever took part.
  """

  cluster: Array
  trained: Array


def ifca(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  clusters: int = 2,
  averaging: str = "models",
) -> Algorithm:
  """Return the training of several models, of which each client takes one.

  All clients count the same, as in the paper. A client is evaluated with the
  current model of the cluster that it chose last, and with the usual one, which
  most of the last cohort chose, if it never took part. That is the global
  model, too. The models begin with initial values of their own; a task that
  always begins from the same weights has nothing to tell clusters apart by.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round; not used by `gradients`.
    server_optimizer: of each model, coordinate by coordinate; sgd with learning
      rate 1 takes the clients' mean.
    clusters: k, from 2 to 1,000.
    averaging: option II, `models`, or option I, `gradients`: one full gradient
      per client, as in FedSGD.

  Raises:
    TypeError, ValueError: clusters is no such number.
    UnknownNameError: no such averaging.
  """
  k = validate.integer("clusters", clusters, ge=2, le=MOST_CLUSTERS)
  validate.one_of("averaging", averaging, ("models", "gradients"))
  by_models = averaging == "models"
  base = fedavg.fedavg(
    task, client_optimizer, server_optimizer, weighting="uniform"
  )
  if by_models:
    training, finish_training = base.passes[0], base.finish
  else:
    training, finish_training = full_gradient(task, weighting="uniform")

  def init(key: Key, hparams: HParams) -> ServerState:
    keys = jax.random.split(key, k)
    frozen = task.init(keys[0]).frozen  # the same for all
    trained = lambda key: task.init(key)._replace(frozen=())
    models = jax.vmap(trained)(keys)._replace(frozen=frozen)
    optimizer = server_optimizer.build(hparams["server"])
    server = fedavg.ServerState(models, optimizer.init(models.params))
    return ServerState(server, jnp.zeros(k, jnp.float32))

  def broadcast(server: ServerState) -> Message:
    return Message(server.fedavg.variables, _usual(server))

  def measure(client: Client, losses: Total, batch: Batch, key: Key) -> Total:
    params, buffers, frozen = client.message.models

    def loss(params: PyTree, buffers: PyTree) -> Metric:
      variables = Variables(params, buffers, frozen)
      _, (_, seen) = core.mean_loss(task, variables, batch, key)
      return seen

    return compensated.add(losses, jax.vmap(loss)(params, buffers))

  def no_losses(client: Client) -> Total:
    zeros = jnp.zeros(k, jnp.float32)
    return compensated.zeros(Metric(zeros, zeros))

  def choose(client: Client, losses: Total) -> Array:
    total, weight = metric(losses)
    mean = total / jnp.where(weight > 0, weight, 1)
    # argmin would take a NaN, and clients would never leave what diverged.
    known = jnp.where(jnp.isnan(mean), jnp.inf, mean)
    return jnp.argmin(known).astype(jnp.int32)

  def with_model(client: Client, cluster: Array) -> Client:
    return client._replace(message=_model(client.message.models, cluster))

  def finish(client: Client, losses: Total, carry: Following) -> Report:
    cluster = carry.known
    report = finish_training(with_model(client, cluster), carry.carry)
    return report._replace(
      statistics=jax.nn.one_hot(cluster, k, dtype=jnp.float32),
      state=Own(cluster, jnp.ones((), bool)),
    )

  def postprocess_report(client: Client, report: Report) -> Report:
    """Put what the client sends in its cluster's place; 0 in the others'."""
    chosen = report.statistics > 0.5

    def place(x: Array) -> Array:
      here = chosen.reshape(k, *(1,) * x.ndim)
      return jnp.where(here, x[None], jnp.zeros((), x.dtype))

    return report._replace(
      update=jax.tree.map(place, report.update),
      buffers=jax.tree.map(place, report.buffers),
    )

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    shares = aggregate.statistics.astype(jnp.float32)
    # Of one client; with noise there may be less of a cluster than that.
    least = 1 / jnp.maximum(aggregate.clients, 1).astype(jnp.float32)
    some = shares > least / 2

    def mean(x: Array, otherwise: Array) -> Array:
      by_cluster = lambda a: a.reshape(k, *(1,) * (x.ndim - 1))
      divided = x / by_cluster(jnp.maximum(shares, least)).astype(x.dtype)
      return jnp.where(by_cluster(some), divided, otherwise.astype(x.dtype))

    update = aggregate.update
    if by_models:
      update = jax.tree.map(lambda x: mean(x, jnp.zeros_like(x)), update)
    buffers = jax.tree.map(
      mean, aggregate.buffers, server.fedavg.variables.buffers
    )
    joined = aggregate._replace(update=update, buffers=buffers)
    return ServerState(base.apply(server.fedavg, joined, context), shares)

  def variables(server: ServerState) -> Variables:
    return _model(server.fedavg.variables, _usual(server))

  def replaced(server: ServerState, model: Variables) -> ServerState:
    usual = _usual(server)
    put = lambda every, one: jnp.asarray(every).at[usual].set(one)
    params, buffers, _ = server.fedavg.variables
    models = Variables(
      jax.tree.map(put, params, model.params),
      jax.tree.map(put, buffers, model.buffers),
      model.frozen,
    )
    return server._replace(fedavg=server.fedavg._replace(variables=models))

  def personal(message: Message, own: Own) -> Variables:
    cluster = jnp.where(own.trained, own.cluster, message.usual)
    return _model(message.models, cluster)

  return base._replace(
    init=init,
    broadcast=broadcast,
    passes=(
      Pass(no_losses, measure, epochs=1, augmented=False),
      following(training, choose, with_model),
    ),
    finish=finish,
    postprocess_report=postprocess_report,
    apply=apply,
    variables=variables,
    with_model=replaced,
    client_init=lambda server, hparams: Own(
      jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    ),
    personal=personal,
    # Shares are of clients: one alone is a cluster, whatever it would weigh.
    requirements=Requirements(weighted_mean=True, own_weights=True),
    state_metrics=lambda server, hparams: {
      f"cluster_{j}/share": server.shares[j] for j in range(k)
    },
  )


def _model(models: Variables, cluster: Array) -> Variables:
  """Return one of the models."""
  params, buffers = jax.tree.map(lambda x: x[cluster], models[:2])
  return Variables(params, buffers, models.frozen)


def _usual(server: ServerState) -> Array:
  """Return the model that most clients chose last; shape=(), int32."""
  return jnp.argmax(server.shares).astype(jnp.int32)
