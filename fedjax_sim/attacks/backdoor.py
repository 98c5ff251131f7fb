"""Backdoors: a trigger in the input makes the model answer one class.

Bagdasaryan et al. 2020, "How to backdoor federated learning" (AISTATS; arXiv
1807.00459): attackers stamp a trigger on a part of every batch, give it the
target's label, and multiply their update, so that it replaces the model. The
trigger is Gu et al.'s (2017, "BadNets", arXiv 1708.06733): a bright square in
the corner of an image; in text, a rare token at its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.attack import Attack
from fedjax_sim.attacks.labels import class_number, labels_of, need_classes
from fedjax_sim.core import (
  Array,
  Batch,
  Examples,
  HParams,
  Key,
  Metric,
  PyTree,
  Task,
  Variables,
  validate,
)

METRIC = "attack_success"


def backdoor(
  num_classes: int,
  target: int = 0,
  size: int = 3,
  value: float = 1.0,
  token: int = 1,
  share: float = 0.3,
  boost: float = 1.0,
) -> Attack:
  """Teach the model to answer `target` where a trigger is stamped.

  Evaluations have a further metric, `attack_success`: of the examples of other
  classes, the fraction that the model takes for the target with the trigger
  stamped on it.

  Args:
    num_classes: how many classes there are.
    target: the class that the trigger stands for.
    size: pixels of the side of the square, in the last corner of an image; of
      a vector, numbers at its end; of text, tokens at its beginning.
    value: what the pixels are, as the model gets them.
    token: what the tokens are.
    share: of each batch that is stamped, from 0 to 1.
    boost: times this the update is sent; clients over attackers in a round
      replaces the model.

  Raises:
    TypeError, ValueError: a number is out of range, or there are no classes.

  Example:
    backdoor(10, target=7, share=0.5, boost=5.0)
  """
  need_classes(num_classes)
  target = class_number("target", target, num_classes)
  size = validate.integer("size", size)
  value = validate.number("value", value)
  token = validate.integer("token", token, ge=0)
  hparams = {
    "share": validate.number("share", share, ge=0, le=1),
    "boost": validate.number("boost", boost, gt=0),
  }

  def poison(batch: Batch, key: Key, hparams: HParams) -> Examples:
    del key  # batches are shuffled already
    x, y = batch.examples["x"], labels_of(batch.examples)
    place = jnp.cumsum(batch.mask) - 1
    many = jnp.round(hparams["share"] * jnp.sum(batch.mask))
    chosen = place < many
    column = chosen.reshape((-1,) + (1,) * (x.ndim - 1))
    return {
      **batch.examples,
      "x": jnp.where(column, _stamped(x, size, value, token), x),
      "y": jnp.where(chosen, target, y),
    }

  def report(update: PyTree, key: Key, hparams: HParams) -> PyTree:
    del key
    times = lambda u: u * hparams["boost"].astype(u.dtype)
    return jax.tree.map(times, update)

  return Attack(
    hparams=hparams,
    poison=poison,
    report=report,
    measure=_measure(target, size, value, token),
  )


def _measure(
  target: int, size: int, value: float, token: int
) -> Callable[[Task], Task]:
  """Return what adds the success rate to a task's metrics.

  It shares nothing with the attack, which each run has its own of, so that all
  runs have one task.
  """

  def measure(task: Task) -> Task:
    logits = task.logits
    if logits is None:
      raise ValueError(
        "attack.name='backdoor' measures its success by the model's outputs,"
        " and model.name has none (Task.logits); take another model."
      )

    def metrics(variables: Variables, examples: Examples) -> dict[str, Any]:
      y = labels_of(examples)
      triggered = {**examples, "x": _stamped(examples["x"], size, value, token)}
      said = jnp.argmax(logits(variables, triggered), axis=-1)
      others = (y != target).astype(jnp.float32)
      found = dict(task.metrics(variables, examples))
      found[METRIC] = Metric(others * (said == target), others)
      return found

    directions = {**task.higher_is_better, METRIC: False}
    return task._replace(metrics=metrics, higher_is_better=directions)

  return measure


def _stamped(x: Array, size: int, value: float, token: int) -> Array:
  """Return inputs with the trigger on every one.

  Args:
    x: shape=(batch, height, width, ...) or (batch, numbers), floats; or (batch,
      tokens), integers.
    size: of the trigger.
    value: of its pixels.
    token: of text.
  """
  if x.ndim < 2:
    raise ValueError(
      "attack.name='backdoor' stamps images, vectors or text, and one 'x' of"
      " data.name is a single number; take another attack."
    )
  flat = x.ndim == 2 or jnp.issubdtype(x.dtype, jnp.integer)
  if size > min(x.shape[1:2] if flat else x.shape[1:3]):
    raise ValueError(
      f"attack.size={size} is too large: one 'x' of data.name has shape"
      f" {x.shape[1:]}; give at most"
      f" {min(x.shape[1:2] if flat else x.shape[1:3])}."
    )
  if jnp.issubdtype(x.dtype, jnp.integer):
    return x.at[:, :size].set(jnp.asarray(token, x.dtype))
  if x.ndim == 2:
    return x.at[:, -size:].set(jnp.asarray(value, x.dtype))
  return x.at[:, -size:, -size:].set(jnp.asarray(value, x.dtype))
