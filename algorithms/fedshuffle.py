"""FedShuffle: clients with more data take shorter steps, and count by weight.

Horvath et al. 2022, "FedShuffle: Recipes for better use of local work in
federated learning" (arXiv 2204.13169), without its variance reduction. Client i
goes through its n_i examples in a new order in every epoch, and takes its c_i
local steps with the rate eta / c_i, so that all clients go equally far. With
w_i = n_i / sum_j n_j over all N clients, the server's step is along

    N / S sum_{i in cohort} w_i Delta_i

for a cohort of S, which is unbiased if every client is as likely to be drawn. A
mean whose weights sum to one within each cohort ("sum one" in the paper) is
not, if cohorts differ in how many examples they have.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Batch,
  Client,
  Context,
  Key,
  Report,
  Task,
  validate,
)
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer, check


def fedshuffle(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  mean_examples: float | None = None,
  *,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg whose clients divide their rate by their local steps.

  If all clients take c steps, and have equally many examples, it is FedAvg with
  the rate eta / c.

  Args:
    task: what clients train.
    client_optimizer: one with a learning rate, eta; starts anew in every round.
    server_optimizer: sgd with learning rate 1 is the paper's.
    mean_examples: sum_j n_j / N, the mean number of examples that clients use
      in a round; a config knows it. None: weights sum to one in each cohort.
    weighting: w_i, up to a factor; as in `fedavg`. With `uniform` all w_i are
      1 / N, and with `tokens` weights sum to one in each cohort;
      `mean_examples` does not matter then.

  Raises:
    TypeError, ValueError: mean_examples is no positive number, or the client's
      learning rate is none.
  """
  check("client_optimizer", client_optimizer)
  if "learning_rate" not in client_optimizer.hparams:
    raise ValueError(
      "client_optimizer has no learning_rate that is a number, which each"
      " client would divide by its local steps; give one, such as"
      ' optimizer("sgd", learning_rate=0.1), and a schedule of it to the run.'
    )
  base = fedavg(task, client_optimizer, server_optimizer, weighting=weighting)
  unbiased = mean_examples is not None and weighting == "examples"
  numbers = {}
  if unbiased:
    numbers["mean_examples"] = validate.number(
      "mean_examples", mean_examples, gt=0
    )
  (training,) = base.passes

  def start(client: Client, *earlier: Any) -> LocalState:
    carry: LocalState = training.start(_slower(client), *earlier)
    return carry

  def step(
    client: Client, carry: LocalState, batch: Batch, key: Key
  ) -> LocalState:
    carry = training.step(_slower(client), carry, batch, key)
    return carry

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    if not unbiased:
      return report
    mean = client.hparams["mean_examples"].astype(report.weight.dtype)
    return report._replace(weight=report.weight / mean)  # N w_i

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    if not unbiased:
      return base.apply(server, aggregate, context)
    total = aggregate.weight / jnp.maximum(aggregate.clients, 1)
    update = jax.tree.map(lambda u: total.astype(u.dtype) * u, aggregate.update)
    return base.apply(server, aggregate._replace(update=update), context)

  return base._replace(
    passes=(training._replace(start=start, step=step),),
    finish=finish,
    apply=apply,
    hparams={**base.hparams, **numbers},
  )


def _slower(client: Client) -> Client:
  """Return the client with its learning rate over its number of steps."""
  own = client.hparams["client"]
  rate = own["learning_rate"]
  steps = jnp.maximum(client.num_steps[0], 1).astype(rate.dtype)
  own = {**own, "learning_rate": rate / steps}
  return client._replace(hparams={**client.hparams, "client": own})
