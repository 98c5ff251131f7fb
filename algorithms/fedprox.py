"""FedProx: FedAvg with a proximal term that keeps clients near the server.

Li et al. 2020, "Federated optimization in heterogeneous networks" (arXiv
1812.06127), algorithm 2: clients minimize f_k(w) + mu / 2 ||w - w_t||^2, whose
gradient is grad f_k(w) + mu (w - w_t).
"""

from __future__ import annotations

import jax

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, Client, PyTree, Task, validate
from fedjax_sim.training.optimizers import Optimizer


def fedprox(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  mu: float = 0.01,
  cumulative: bool = False,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg with a proximal term in the clients' loss.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    server_optimizer: sgd with learning rate 1 takes the clients' mean.
    mu: weight of the proximal term, >= 0; 0 is FedAvg.
    cumulative: as FLUTE's code has it, which adds the terms of the parameter
      arrays up and the running sum to the loss: of P arrays the i-th, from 0
      and in the order of the parameters' paths, counts P - i times.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: mu is not such a number.
  """
  mu = validate.number("mu", mu, ge=0.0)
  validate.boolean("cumulative", cumulative)

  def proximal(client: Client, params: PyTree, gradient: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(gradient)
    count = len(leaves)
    times = [float(count - i) if cumulative else 1.0 for i in range(count)]
    weight = client.hparams["mu"]
    return jax.tree.map(
      lambda g, w, w_t, n: g + (n * weight).astype(g.dtype) * (w - w_t),
      gradient,
      params,
      client.message.params,
      jax.tree.unflatten(treedef, times),
    )

  base = fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting=weighting,
    gradient_hook=proximal,
  )
  return base._replace(hparams={**base.hparams, "mu": mu})
