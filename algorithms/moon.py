"""MOON: representations are drawn to the global model's, away from the last.

Li et al. 2021, "Model-contrastive federated learning" (arXiv 2103.16257),
algorithm 1. With the representation z of an example by the client's model,
z_glob by the one that it received and z_prev by the one that it last sent, and
the cosine similarity sim, a local step adds to the loss mu times the mean of

    -log(exp(sim(z, z_glob) / T) / (exp(sim(z, z_glob) / T)
                                    + exp(sim(z, z_prev) / T)))

A client that never took part has no last model, and adds nothing. The
representation is `Task.features`, in evaluation mode: without dropout, and with
running batch statistics.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  Report,
  Task,
  Variables,
  in_float32,
  validate,
)
from fedjax_sim.training import own_models
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer

LEAST_NORM = 1e-8  # of a representation, so that all zeros have a gradient


def moon(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  mu: float = 1.0,
  temperature: float = 0.5,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg with a model-contrastive term in the clients' loss.

  A local step computes the representations of three models, and each client
  keeps a model.

  Args:
    task: what clients train, with `Task.features`.
    client_optimizer: starts anew in every round.
    server_optimizer: sgd with learning rate 1 takes the clients' mean.
    mu: weight of the term, >= 0; 0 is FedAvg. The paper takes 1 to 10.
    temperature: T, > 0; similarities count more the smaller it is.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a number is out of range, or the task has no
      features.
  """
  mu = validate.number("mu", mu, ge=0)
  temperature = validate.number("temperature", temperature, gt=0)
  validate.instance("task", task, Task, "function_task(init, loss)")
  if task.features is None:
    raise ValueError(
      "moon compares representations, and the task has no Task.features; give"
      " the module a method `features`, what __call__ computes before its last"
      " layer, or take a model that has one, such as model.name='mlp'."
    )
  read = task.features

  def contrast(client: Client, local: Variables, batch: Batch) -> Array:
    message, previous = client.message, client.state
    last = own_models.in_place(message, previous)
    z, z_glob, z_prev = (
      read(model, batch.examples) for model in (local, message, last)
    )
    value = contrastive(z, z_glob, z_prev, client.hparams["temperature"])
    total = jnp.sum(jnp.where(batch.mask, value, 0))
    mean = total / jnp.maximum(jnp.sum(batch.mask), 1)
    return jnp.where(previous.trained, client.hparams["mu"] * mean, 0)

  base = fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting=weighting,
    extra_loss=contrast,
  )

  def finish(client: Client, carry: LocalState) -> Report:
    kept = own_models.kept(carry.params, carry.buffers)
    return base.finish(client, carry)._replace(state=kept)

  return base._replace(
    finish=finish,
    client_init=lambda server, hparams: own_models.first(server.variables),
    hparams={**base.hparams, "mu": mu, "temperature": temperature},
  )


def contrastive(
  z: Array, z_glob: Array, z_prev: Array, temperature: Array | float
) -> Array:
  """Return each example's contrastive loss, shape=(batch,), float32 at least.

  Args:
    z: the local model's representations, shape=(batch, ...).
    z_glob: the global model's.
    z_prev: those of the client's last model.
    temperature: T.
  """
  z, z_glob, z_prev = (
    in_float32(x).reshape(x.shape[0], -1) for x in (z, z_glob, z_prev)
  )
  near, far = (_cosine(z, other) / temperature for other in (z_glob, z_prev))
  return jnp.logaddexp(near, far) - near


def _cosine(a: Array, b: Array) -> Array:
  """Return the cosine of the rows' angles, shape=(rows,)."""
  norm = lambda x: jnp.sqrt(jnp.maximum(jnp.sum(x**2, -1), LEAST_NORM**2))
  return jnp.sum(a * b, -1) / (norm(a) * norm(b))
