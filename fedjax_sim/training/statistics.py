"""Sums over a client's examples, for algorithms whose update is a statistic.

k-means, mixtures and histograms take no gradient. A client goes over its data
once, adds something up, and reports the mean over its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import jax

from fedjax_sim import core
from fedjax_sim.core import (
  Array,
  Batch,
  Client,
  Examples,
  Key,
  Pass,
  PyTree,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.training.local import zero_metric


class Sums(NamedTuple):
  """A client's carry; `compensated.rounded` and `local.metric` read it.

  Attributes:
    terms: a `Total` of what batches add.
    loss: a `Total` of the loss's `Metric`.
  """

  terms: Total
  loss: Total


def sum_pass(
  task: Task,
  zero: Callable[[Client], PyTree],
  term: Callable[[Client, Batch], PyTree],
  model: Callable[[Client], Variables] = lambda client: client.message,
) -> Pass:
  """Return one epoch over a client's data that sums a statistic and the loss.

  Args:
    task: whose loss is summed.
    zero: client -> arrays with the shapes of the statistic.
    term: (client, batch) -> what a batch adds, in float32 at least; padding
      adds nothing.
    model: client -> the model whose loss it is.

  Example:
    >>> count = lambda client, batch: jnp.sum(batch.mask, dtype=jnp.float32)
    >>> sum_pass(task, lambda client: jnp.zeros(()), count).epochs
    1
  """

  def start(client: Client) -> Sums:
    return Sums(compensated.zeros(zero(client)), zero_metric())

  def step(client: Client, carry: Sums, batch: Batch, key: Key) -> Sums:
    _, (_, loss) = core.mean_loss(task, model(client), batch, key)
    return Sums(
      compensated.add(carry.terms, term(client, batch)),
      compensated.add(carry.loss, loss),
    )

  return Pass(start, step, epochs=1)


def check_model(
  task: Task,
  params: Collection[str],
  frozen: Collection[str],
  *,
  function: Literal["logits", "features"],
  model: str,
  message: str,
) -> Callable[[Variables, Examples], Array]:
  """Return what a task makes of examples, if its model is the one meant.

  Args:
    task: whose model is looked at; nothing is computed.
    params: names of all parameters, which must be trainable.
    frozen: names that frozen variables must have.
    function: of the task, that an algorithm needs.
    model: the name of the model that is meant, for messages.
    message: what is wrong otherwise, with its algorithm and without remedy.

  Raises:
    TypeError: no task.
    ValueError: another model, or one that is frozen; a task without the
      function.
  """
  validate.instance("task", task, Task, f"models.{model}.{model}(...)")
  there, _, fixed = jax.eval_shape(task.init, jax.random.key(0))
  if (
    not isinstance(there, dict)
    or set(there) != set(params)
    or not isinstance(fixed, dict)
    or not set(frozen) <= set(fixed)
  ):
    raise ValueError(
      f"{message}; set model.name={model!r}, and model.frozen=None."
    )
  made: Callable[[Variables, Examples], Array] | None = getattr(task, function)
  if made is None:
    raise ValueError(
      f"algorithm.name={model!r} needs Task.{function}, and this task has none;"
      f" give it, as models.{model} does."
    )
  return made
