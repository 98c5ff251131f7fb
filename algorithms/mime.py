"""Mime: MimeLite whose local steps are corrected as SVRG's are.

Karimireddy et al. 2020, "Mime: Mimicking centralized stochastic algorithms in
federated learning" (arXiv 2008.03606), algorithm 1. The clients S of a round
first compute their full gradients at x, whose mean c goes back to them; their
local steps on batches zeta are

    y_i <- y_i - eta U(grad f_i(y_i; zeta) - grad f_i(x; zeta) + c, s)

and the server renews the state s of the base optimizer by V(c, s).
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from fedjax_sim import core
from fedjax_sim.algorithms.mime_lite import get_x, mimicking
from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  Key,
  PyTree,
  Report,
  Survey,
  Task,
  Variables,
  in_float32,
)
from fedjax_sim.training.local import LocalState, full_gradient
from fedjax_sim.training.optimizers import Optimizer


class Message(NamedTuple):
  """What clients train with: x, s, and the correction of their gradients."""

  x: Variables
  s: PyTree
  correction: PyTree  # c; in a local step, c - grad f_i(x; zeta)


def mime(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  weighting: str = "uniform",
) -> Algorithm:
  """Return MimeLite with corrected gradients, in rounds of two exchanges.

  A local step takes two gradients, and every client answers a survey with its
  full gradient before it trains.

  Args:
    task: what clients train.
    client_optimizer: the base optimizer, as in `mime_lite`.
    server_optimizer: sgd with learning rate 1 takes the mean of the y_i, as in
      the paper.
    weighting: of the gradients in c, and of the y_i, as in `fedavg`; the
      paper's is `uniform`.
  """
  at_x = full_gradient(task, weighting=weighting, get_model=get_x)

  def corrected(client: Client, params: PyTree, gradient: PyTree) -> PyTree:
    return jax.tree.map(
      lambda g, more: g + more.astype(g.dtype),
      gradient,
      client.message.correction,
    )

  base = mimicking(
    task,
    client_optimizer,
    server_optimizer,
    weighting=weighting,
    hook=corrected,
    mean_gradient=lambda aggregate, context: context.survey,
  )
  (training,) = base.passes

  def step(
    client: Client, carry: LocalState, batch: Batch, key: Key
  ) -> LocalState:
    message = client.message

    def loss(params: PyTree) -> Array:
      variables = Variables(params, carry.buffers, message.x.frozen)
      return core.mean_loss(task, variables, batch, key)[0]

    correction = jax.tree.map(
      lambda c, g: c - g.astype(c.dtype),
      message.correction,
      jax.grad(loss)(message.x.params),
    )
    corrected = client._replace(message=message._replace(correction=correction))
    after: LocalState = training.step(corrected, carry, batch, key)
    return after

  return base._replace(
    passes=(training._replace(step=step),),
    survey=Survey(
      passes=(at_x.local_pass,),
      finish=lambda client, carry: gradient_answer(at_x.finish(client, carry)),
      message=lambda first, c: Message(first.x, first.s, c),
    ),
  )


def gradient_answer(report: Report) -> Report:
  """Return the report of a full gradient as an answer to a survey."""
  gradient = jax.tree.map(lambda u: -u, in_float32(report.update))
  return Report((), report.weight, statistics=gradient)
