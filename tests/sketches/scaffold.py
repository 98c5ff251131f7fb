"""SCAFFOLD, Karimireddy et al. 2020 (arXiv 1910.06378), with option II."""

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.training.optimizers import optimizer


def zeros_like(tree):
  return jax.tree.map(jnp.zeros_like, tree)


def scaffold(task, rate, server_rate=1.0):
  """FedAvg's (server, client) states, and beside each a control variate."""

  def corrected(client, params, gradient):
    c, c_k = client.message[1], client.state
    return jax.tree.map(lambda g, c, c_k: g - c_k + c, gradient, c, c_k)

  base = fedavg(
    task,
    optimizer("sgd", learning_rate=rate),
    optimizer("sgd", learning_rate=server_rate),
    weighting="uniform",
    adjust=corrected,
    received=lambda client: client.message[0],
  )

  def init(key, hparams):
    server = base.init(key, hparams)
    return server, zeros_like(server.variables.params)

  def finish(client, carry):
    report = base.finish(client, carry)
    path = client.num_steps[0] * client.hparams["client"]["learning_rate"]
    change = jax.tree.map(
      lambda c, u: -c - u / path, client.message[1], report.update
    )
    kept = jax.tree.map(jnp.add, client.state, change)
    return report._replace(statistics=change, state=kept)

  def apply(state, aggregate, context):
    server, c = state
    share = aggregate.clients / context.num_clients
    c = jax.tree.map(lambda c, d: c + share * d, c, aggregate.statistics)
    return base.apply(server, aggregate, context), c

  return base._replace(
    init=init,
    broadcast=lambda state: (state[0].variables, state[1]),
    finish=finish,
    apply=apply,
    with_model=None,
    variables=lambda state: state[0].variables,
    client_init=lambda state, hparams: zeros_like(state[1]),
  )
