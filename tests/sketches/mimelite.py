"""MimeLite with momentum, Karimireddy et al. 2020 (arXiv 2008.03606)."""

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.training.local import full_gradient
from fedjax_sim.training.optimizers import optimizer


def mimelite(task, rate, beta=0.9):
  """Clients apply the server's momentum, which only full gradients change."""

  def with_momentum(client, params, gradient):
    b, momentum = client.hparams["beta"], client.message[1]
    return jax.tree.map(lambda g, m: (1 - b) * g + b * m, gradient, momentum)

  received = lambda client: client.message[0]
  full = full_gradient(task, received=received)
  base = fedavg(
    task,
    optimizer("sgd", learning_rate=rate),
    optimizer("sgd", learning_rate=1.0),
    adjust=with_momentum,
    received=received,
  )

  def init(key, hparams):
    server = base.init(key, hparams)
    return server, jax.tree.map(jnp.zeros_like, server.variables.params)

  def finish(client, gradient, trained):
    negative = full.finish(client, gradient).update
    return base.finish(client, trained)._replace(statistics=negative)

  def apply(state, aggregate, context):
    server, momentum = state
    b = context.hparams["beta"]
    momentum = jax.tree.map(
      lambda m, u: b * m - (1 - b) * u, momentum, aggregate.statistics
    )
    return base.apply(server, aggregate, context), momentum

  return base._replace(
    init=init,
    broadcast=lambda state: (state[0].variables, state[1]),
    passes=(full.local_pass, *base.passes),
    finish=finish,
    apply=apply,
    with_model=None,
    variables=lambda state: state[0].variables,
    hparams={**base.hparams, "beta": beta},
  )
