"""Centralized training on the pooled data, the baseline of federated learning.

One client holds the union of all clients' data and keeps its optimizer's state
from round to round, so this is ordinary mini-batch training; a round is
`client.epochs` epochs, or `client.steps` steps.
"""

from __future__ import annotations

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, Client, Report, Requirements, Task
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer, optimizer


def centralized(task: Task, client_optimizer: Optimizer) -> Algorithm:
  """Return ordinary training on the pooled data of all clients.

  Args:
    task: what is trained.
    client_optimizer: keeps its state from round to round.
  """
  base = fedavg(task, client_optimizer, optimizer("sgd", learning_rate=1.0))

  training = base.passes[0]

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
    requirements=Requirements(pools_data=True),
  )
