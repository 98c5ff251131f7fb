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


Received = Callable[[Client], Variables]


class LocalState(NamedTuple):
  """A client's carry through its local steps."""

  params: PyTree
  buffers: PyTree
  optimizer: PyTree
  loss: Metric  # summed over the steps; shape=(), dtype=float32


class LocalTraining(NamedTuple):
  """The client's part of an `Algorithm`: one pass, and its report."""

  local_pass: Pass
  finish: Callable[[Client, LocalState], Report]


# (client, its summed loss) -> its weight in means, shape=(), float32.
WEIGHTINGS: dict[str, Callable[[Client, Metric], Array]] = {
  "examples": lambda client, loss: client.num_examples.astype(jnp.float32),
  "tokens": lambda client, loss: loss.weight,
  "uniform": lambda client, loss: jnp.ones((), jnp.float32),
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
    weighting: a client's weight: its number of `examples`; its `tokens`, the
      sum of the loss's weights over its steps; or `uniform`.
    received: client -> the `Variables` that it starts from.

  Raises:
    UnknownNameError: no such weighting.
  """
  weigh = validate.lookup("algorithm.weighting", weighting, WEIGHTINGS)
  validate.instance("task", task, Task, "function_task(init, loss)")
  optimizers.check("client_optimizer", optimizer)

  def start(client: Client, *earlier: PyTree) -> LocalState:
    del earlier
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
      weight=weigh(client, carry.loss),
      buffers=carry.buffers,
      metrics={"loss": carry.loss},
    )

  return LocalTraining(
    Pass(start, step, tokens=lambda carry: carry.loss.weight), finish
  )


def full_gradient(
  task: Task,
  *,
  weighting: str = "examples",
  received: Received = lambda client: client.message,
) -> LocalTraining:
  """The mean gradient over all of a client's data, at what it received.

  The batch size only bounds memory. The report's update is the negative
  gradient, so that a server optimiser sees the gradient.

  Args:
    task: what is differentiated.
    weighting: as in `local_training`.
    received: as in `local_training`.
  """
  weigh = validate.lookup("algorithm.weighting", weighting, WEIGHTINGS)

  def start(client: Client, *earlier: PyTree) -> LocalState:
    del earlier
    params, buffers, _ = received(client)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return LocalState(zeros, buffers, (), zero_metric())

  def step(
    client: Client, carry: LocalState, batch: Batch, key: Key
  ) -> LocalState:
    def total_loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
      variables = Variables(params, carry.buffers, received(client).frozen)
      mean, (buffers, total) = base.mean_loss(task, variables, batch, key)
      return mean * total.weight, (buffers, total)

    gradient, (buffers, total) = jax.grad(total_loss, has_aux=True)(
      received(client).params
    )
    summed = jax.tree.map(jnp.add, carry.params, gradient)
    return LocalState(summed, buffers, (), add_metrics(carry.loss, total))

  def finish(client: Client, carry: LocalState) -> Report:
    weight = jnp.where(carry.loss.weight > 0, carry.loss.weight, 1)
    return Report(
      update=jax.tree.map(lambda g: -g / weight.astype(g.dtype), carry.params),
      weight=weigh(client, carry.loss),
      buffers=carry.buffers,
      metrics={"loss": carry.loss},
    )

  return LocalTraining(Pass(start, step, epochs=1), finish)
