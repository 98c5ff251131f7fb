"""Scheduled sampling: a sequence model sometimes reads its own predictions.

Bengio et al. 2015 (arXiv 1506.03099), in the parallel form of Duckworth et al.
2019 (arXiv 1906.04331) with one pass: the model predicts all tokens from the
true ones, then learns from a text in which some of them are its predictions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Examples, Key, Loss, Task, Variables, validate

FIELD = "scheduled_sampling"


def with_scheduled_sampling(task: Task, probability: float) -> Task:
  """Return the task trained on texts with tokens replaced by predictions.

  Args:
    task: predicts the next token at every position: its examples have `x` and
      `y`, shape=(batch, time), integer, 0 for padding, `y` being what follows
      in the text, and its logits are (batch, time, tokens).
    probability: that a token is replaced, from 0 to 1; the hyper-parameter
      `task.scheduled_sampling`, so that a schedule may raise it.

  Raises:
    TypeError, ValueError: no such probability, or the task has no logits;
      while tracing, examples or logits of another shape.
  """
  field = f"model.{FIELD}"
  probability = validate.number(field, probability, ge=0, le=1)
  read = task.logits
  if read is None:
    raise ValueError(
      f"{field}={probability}: the model tells no logits to sample from; give"
      " Task.logits, or unset the field."
    )

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    given = dict(examples)
    chance = given.pop(FIELD)
    x, y = given["x"], given["y"]
    logits = lax.stop_gradient(read(variables, given))
    if x.ndim != 2 or not x.shape == y.shape == logits.shape[:-1]:
      raise ValueError(
        f"{field}={probability}: 'x' {x.shape}, 'y' {y.shape} and logits"
        f" {logits.shape} are"
        " not of a model that predicts the next token at every position; unset"
        " the field."
      )
    which, what = jax.random.split(jax.random.fold_in(key, 0x73616D70))
    words = logits.at[..., 0].set(-jnp.inf)  # padding is no prediction
    predicted = jax.random.categorical(what, words).astype(x.dtype)
    before = jnp.roll(predicted, 1, axis=1)  # what is read next
    replaced = jax.random.uniform(which, x.shape) < chance[:, jnp.newaxis]
    replaced &= (x != 0) & (jnp.arange(x.shape[1]) > 0)[jnp.newaxis]
    given["x"] = jnp.where(replaced, before, x)
    return task.loss(variables, given, key)

  return task._replace(loss=loss, hparams={**task.hparams, FIELD: probability})
