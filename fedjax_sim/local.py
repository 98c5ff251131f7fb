"""Local training: what a client does with its own data in most algorithms.

Several steps of an optimiser on mini-batches, starting from the server's
parameters (McMahan et al. 2017, arXiv 1602.05629, `ClientUpdate`). Algorithms
that differ in the gradient alone pass `adjust`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim import base, optimizers, validate
from fedjax_sim.base import (
    Array,
    Batch,
    Client,
    Key,
    Metric,
    Pass,
    PyTree,
    Report,
    Task,
    Variables,
)

Adjust = Callable[[Client, PyTree, PyTree], PyTree]


class LocalState(NamedTuple):
  """A client's carry through its local steps."""

  params: PyTree
  buffers: PyTree
  optimizer: PyTree
  loss: Metric  # summed over the steps; shape=(), dtype=float32


class LocalTraining(NamedTuple):
  """The client's half of an `Algorithm`."""

  start: Callable[[Client], LocalState]
  passes: tuple[Pass, ...]
  finish: Callable[[Client, LocalState], Report]


WEIGHTINGS: dict[str, Callable[[Client], Array]] = {
    "examples": lambda client: client.num_examples.astype(jnp.float32),
    "uniform": lambda client: jnp.ones((), jnp.float32),
}


def zero_metric() -> Metric:
  """A `Metric` of nothing yet."""
  return Metric(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def add_metrics(a: Metric, b: Metric) -> Metric:
  """The sum, in the dtype of `a`."""
  return jax.tree.map(lambda x, y: x + y.astype(x.dtype), a, b)


def difference(after: PyTree, before: PyTree) -> PyTree:
  """`after - before`, leaf by leaf: a client's update."""
  return jax.tree.map(jnp.subtract, after, before)


def local_training(
    task: Task,
    optimizer: optimizers.Optimizer,
    *,
    adjust: Adjust | None = None,
    weighting: str = "examples",
    received: Callable[[Client], Variables] = lambda client: client.message,
) -> LocalTraining:
  """Mini-batch training from the server's parameters.

  Args:
    task: what is trained.
    optimizer: the client's optimiser; its state starts anew every round. Its
      hyper-parameters are read from `hparams["client"]`.
    adjust: (client, params, gradient) -> gradient, before the optimiser.
    weighting: a client's weight: its number of `examples`, or `uniform`.
    received: client -> the `Variables` in the server's message.

  Raises:
    UnknownNameError: no such weighting.
  """
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)

  def start(client: Client) -> LocalState:
    params, buffers, _ = received(client)
    state = optimizer.build(client.hparams["client"]).init(params)
    return LocalState(params, buffers, state, zero_metric())

  def step(
      client: Client, carry: LocalState, batch: Batch, key: Key
  ) -> LocalState:
    def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
      variables = Variables(params, carry.buffers, received(client).frozen)
      return base.mean_loss(task, variables, batch, key)

    gradient, (buffers, total) = jax.grad(loss, has_aux=True)(carry.params)
    if adjust is not None:
      gradient = adjust(client, carry.params, gradient)
    params, state = optimizers.descend(
        optimizer.build(client.hparams["client"]),
        gradient,
        carry.optimizer,
        carry.params,
    )
    return LocalState(params, buffers, state, add_metrics(carry.loss, total))

  def finish(client: Client, carry: LocalState) -> Report:
    return Report(
        update=difference(carry.params, received(client).params),
        weight=weigh(client),
        buffers=carry.buffers,
        metrics={"loss": carry.loss},
    )

  return LocalTraining(start, (Pass(step),), finish)
