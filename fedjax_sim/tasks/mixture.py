"""Mixtures: several models of one kind, whose probabilities are averaged.

Of M components with weights pi, p(y | x) = sum_m pi_m p_m(y | x). All of them
are one model with M times the parameters; pi are a buffer, which is changed
without a gradient. Trained by FedAvg it is an ensemble with fixed weights;
`algorithms/fedem.py` gives every client weights of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  PyTree,
  Task,
  Variables,
  validate,
)
from fedjax_sim.tasks.losses import classification_metrics, token_metrics

MOST_COMPONENTS = 1000


class MixtureBuffers(NamedTuple):
  """What changes in training without a gradient.

  Attributes:
    weights: shape=(components,), float32; pi, whose sum is 1.
    model: the components' buffers, leaves (components, ...).
  """

  weights: Array
  model: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureLoss:
  """The loss of a mixture, -log sum_m pi_m exp(-l_m) of each example.

  Attributes:
    task: of one component.
  """

  task: Task

  def components(
    self, variables: Variables, examples: Examples, key: Key
  ) -> Loss:
    """Return l_m, each component's loss.

    Args:
      variables: of the mixture.
      examples: of a batch.
      key: of the local step, the same for all.

    Returns:
      `Loss` with a value of shape=(components, batch), the examples' weights,
      shape=(batch,), and buffers, leaves (components, ...).
    """

    def one(params: PyTree, buffers: PyTree) -> Any:
      own = Variables(params, buffers, variables.frozen)
      return self.task.loss(own, examples, key)

    made = jax.vmap(one)(variables.params, variables.buffers.model)
    return Loss(made.value, made.weight[0], made.buffers)

  def __call__(
    self, variables: Variables, examples: Examples, key: Key
  ) -> Loss:
    """Return the loss of every example, as `Task.loss`."""
    value, weight, buffers = self.components(variables, examples, key)
    weights = variables.buffers.weights
    joint = -jax.nn.logsumexp(_log(weights)[:, None] - value, axis=0)
    return Loss(joint, weight, MixtureBuffers(weights, buffers))


def with_mixture(task: Task, components: int) -> Task:
  """Return the task of a mixture of such models.

  The components begin with initial values of their own, and equal weights.
  Outputs are logarithms of probabilities; metrics are the loss and the accuracy
  of these.

  Args:
    task: a classifier, or a model of tokens, with `Task.logits`.
    components: how many, from 2 to 1,000.

  Raises:
    TypeError, ValueError: no such number, or a task without logits.

  Example:
    >>> mixture = with_mixture(logistic_regression((4,), 2), components=3)
  """
  count = validate.integer(
    "model.mixture", components, ge=2, le=MOST_COMPONENTS
  )
  if task.logits is None:
    raise ValueError(
      f"model.mixture={count} averages probabilities, and the model has no"
      " logits; give the task Task.logits, or unset it."
    )
  outputs_of = task.logits

  def init(key: Key) -> Variables:
    keys = jax.random.split(key, count)
    trained = lambda key: task.init(key)._replace(frozen=())
    params, buffers, _ = jax.vmap(trained)(keys)
    weights = jnp.full(count, 1 / count, jnp.float32)
    frozen = task.init(keys[0]).frozen  # the same for all
    return Variables(params, MixtureBuffers(weights, buffers), frozen)

  def logits(variables: Variables, examples: Examples) -> Array:
    def one(params: PyTree, buffers: PyTree) -> Array:
      own = Variables(params, buffers, variables.frozen)
      return jax.nn.log_softmax(outputs_of(own, examples), axis=-1)

    weights, buffers = variables.buffers
    found = jax.vmap(one)(variables.params, buffers)
    prior = _log(weights).reshape(count, *(1,) * (found.ndim - 1))
    return jax.nn.logsumexp(prior + found, axis=0)

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    of_outputs = (
      classification_metrics if examples["y"].ndim == 1 else token_metrics
    )
    return of_outputs(logits(variables, examples), examples)

  return task._replace(
    init=init,
    loss=MixtureLoss(task),
    metrics=metrics,
    logits=logits,
    joint={},
  )


def responsibilities(losses: Array, weights: Array) -> Array:
  """Return how likely each component is to have made each example.

  Args:
    losses: shape=(components, batch).
    weights: shape=(components,); pi.

  Returns:
    shape=(components, batch); the sum over components is 1.
  """
  return jax.nn.softmax(_log(weights)[:, None] - losses, axis=0)


def _log(weights: Array) -> Array:
  """Return logarithms, of 0 one that is finite."""
  return jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
