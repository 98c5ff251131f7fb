"""FedAvg, with any optimizer on clients and server.

McMahan et al. 2017, "Communication-efficient learning of deep networks from
decentralized data" (arXiv 1602.05629); Reddi et al. 2021, "Adaptive federated
optimization" (arXiv 2003.00295): clients train locally, and the server feeds
the negative mean of their updates to its optimizer as a gradient. With plain
SGD and learning rate 1 the new model is the mean of the clients' models.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from fedjax_sim.core import (
  Aggregate,
  Algorithm,
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
from fedjax_sim.core.tree import in_dtype
from fedjax_sim.training import optimizers
from fedjax_sim.training.local import (
  ExtraLoss,
  GetModel,
  GradientHook,
  LocalState,
  Observer,
  local_training,
)
from fedjax_sim.training.optimizers import Optimizer, descend


class ServerState(NamedTuple):
  """The global model and the server optimizer's state."""

  variables: Variables
  optimizer: PyTree


def fedavg(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str = "examples",
  keep_optimizer: bool = False,
  gradient_hook: GradientHook | None = None,
  get_model: GetModel = lambda client: client.message,
  observer: Observer | None = None,
  extra_loss: ExtraLoss | None = None,
) -> Algorithm:
  """Return FedAvg: local training, then a server step along the mean update.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round, or see `keep_optimizer`.
    server_optimizer: sgd with learning rate 1 is FedAvg.
    weighting: a client's weight in the mean: its number of `examples`; its
      `tokens`, the sum of the loss's weights over its steps; or `uniform`.
    keep_optimizer: each client goes on with the state that its optimizer had
      when it last took part, as the workers of DiLoCo do.
    gradient_hook: (client, params, gradient) -> gradient, in every local step.
    get_model: client -> the `Variables` that it starts from, for algorithms
      whose message holds more than those.
    observer: what algorithms sum up over a client's local steps.
    extra_loss: (client, variables, batch) -> what is added to the loss of a
      local step, shape=().
  """
  optimizers.check("server_optimizer", server_optimizer)
  local = local_training(
    task,
    client_optimizer,
    weighting=weighting,
    gradient_hook=gradient_hook,
    get_model=get_model,
    observer=observer,
    extra_loss=extra_loss,
  )

  def init(key: Key, hparams: HParams) -> ServerState:
    variables = task.init(key)
    optimizer = server_optimizer.build(hparams["server"])
    return ServerState(variables, optimizer.init(variables.params))

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    params, buffers, frozen = server.variables
    gradient = jax.tree.map(
      lambda u, p: -u.astype(p.dtype), aggregate.update, params
    )
    params, state = descend(
      server_optimizer.build(context.hparams["server"]),
      gradient,
      server.optimizer,
      params,
    )
    buffers = jax.tree.map(
      lambda mean, old: in_dtype(mean, old.dtype), aggregate.buffers, buffers
    )
    return ServerState(Variables(params, buffers, frozen), state)

  algorithm = Algorithm(
    init=init,
    broadcast=lambda server: server.variables,
    passes=(local.local_pass,),
    finish=local.finish,
    apply=apply,
    variables=lambda server: server.variables,
    with_model=lambda server, variables: server._replace(variables=variables),
    hparams={
      "client": client_optimizer.hparams,
      "server": server_optimizer.hparams,
    },
  )
  if validate.boolean("keep_optimizer", keep_optimizer):
    return _keeping_optimizer(algorithm, client_optimizer)
  return algorithm


def _keeping_optimizer(
  base: Algorithm, client_optimizer: Optimizer
) -> Algorithm:
  """Return FedAvg whose clients keep their optimizers from round to round.

  Douillard et al. 2023 (arXiv 2311.08105), section 2: DiLoCo's workers do. Each
  client has its own row of the table of client states.

  Args:
    base: FedAvg, whose clients keep nothing else.
    client_optimizer: that of `base`.
  """
  (training,) = base.passes

  def start(client: Client) -> LocalState:
    carry: LocalState = training.start(client)
    return carry._replace(optimizer=client.state)

  def finish(client: Client, carry: LocalState) -> Report:
    return base.finish(client, carry)._replace(state=carry.optimizer)

  return base._replace(
    passes=(training._replace(start=start),),
    finish=finish,
    client_init=lambda server, hparams: client_optimizer.build(
      hparams["client"]
    ).init(server.variables.params),
  )
