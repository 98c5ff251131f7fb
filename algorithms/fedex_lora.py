"""FedEx-LoRA: low-rank adapters whose products are averaged exactly.

Singhal et al. 2024 (arXiv 2410.09432). The mean of clients' models changes a
kernel by the mean of products A_i B_i, but the product of the mean A and the
mean B is another matrix. The server adds the difference to the frozen kernel.
With client i's changes dA_i and dB_i in a round and weights w_i, this is the
covariance sum_i w_i dA_i dB_i - (sum_i w_i dA_i) (sum_i w_i dB_i).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Context,
  PyTree,
  Requirements,
  Task,
  Variables,
  in_float32,
)
from fedjax_sim.engine.client_log import combine
from fedjax_sim.tasks.lora import A, B, adapters_of, with_kernels
from fedjax_sim.training.optimizers import Optimizer


class Message(NamedTuple):
  """What the server sends.

  Attributes:
    variables: of the model.
    kernels: those with adapters, which are no constants here.
  """

  variables: Variables
  kernels: list[Array]


def fedex_lora(
  task: Task, client_optimizer: Optimizer, server_optimizer: Optimizer
) -> Algorithm:
  """Return FedAvg of adapters with the exact mean of their products.

  Needs the aggregator `stack`, and a task with adapters of which both factors
  train. `bytes_down` counts the adapted kernels, which change in every round;
  of a small cohort, a server could send all of its adapters instead.

  Args:
    task: what clients train, from `with_lora`.
    client_optimizer: starts anew in every round.
    server_optimizer: sgd with learning rate 1 makes the new model the mean of
      the clients' models.

  Raises:
    ValueError: the task has no adapters, their `lora_a` does not train, or the
      kernels are less precise than float32.
  """
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  if not _adapters(shapes.params):
    raise ValueError(
      "algorithm.name='fedex_lora' averages adapters of which both factors"
      " train, and the task has none; set adapter.name='lora' with"
      " adapter.fixed_a=False."
    )
  for path, adapter in adapters_of(shapes).items():
    if adapter.base.dtype.itemsize < 4:
      raise ValueError(
        f"algorithm.name='fedex_lora' adds small differences to {path!r}, which"
        f" {adapter.base.dtype.name} would lose; keep it in float32, as"
        " runtime.frozen_dtype='float32' does."
      )
  base = fedavg(
    task,
    client_optimizer,
    server_optimizer,
    get_model=lambda client: client.message.variables,
  )

  def broadcast(server: ServerState) -> Message:
    adapters = adapters_of(server.variables).values()
    return Message(server.variables, [adapter.base for adapter in adapters])

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    members = aggregate.members
    weights = jnp.where(members.present, members.weight, 0)
    total = jnp.sum(weights)
    weights = weights / jnp.where(total > 0, total, 1)
    joined = combine(aggregate.update, weights)
    server = base.apply(server, aggregate._replace(update=joined), context)
    kernels = {}
    for path, adapter in adapters_of(server.variables).items():
      missed = _covariance(aggregate.update[path], joined[path], weights)
      change = adapter.scale * missed
      kernels[path] = adapter.base + change.astype(adapter.base.dtype)
    variables = with_kernels(server.variables, kernels)
    return server._replace(variables=variables)

  return base._replace(
    broadcast=broadcast,
    apply=apply,
    requirements=Requirements(all_updates=True),
  )


def _adapters(params: PyTree) -> list[str]:
  """Return the paths of the kernels whose factors both train."""
  pairs = isinstance(params, dict) and params.items()
  return [
    path
    for path, part in pairs or ()
    if isinstance(part, dict) and part.keys() == {A, B}
  ]


def _covariance(
  updates: dict[str, Array], means: dict[str, Array], weights: Array
) -> Array:
  """Return the mean of the products dA dB less the product of the means.

  Args:
    updates: of the cohort, (slots, *ins, rank) and (slots, rank, *outs).
    means: their weighted means.
    weights: shape=(slots,); their sum is 1, or 0.

  Returns:
    shape=(*ins, *outs), float32 or wider.
  """
  a, b = (in_float32(updates[name]) for name in (A, B))
  rank = a.shape[-1]
  flat_a = a.reshape(len(a), -1, rank)
  flat_b = b.reshape(len(b), rank, -1)
  mean = jnp.einsum("s,sir,sro->io", weights, flat_a, flat_b)
  mean -= means[A].reshape(-1, rank) @ means[B].reshape(rank, -1)
  return mean.reshape(*means[A].shape[:-1], *means[B].shape[1:])
