"""Tasks of models that read tokens: masked and causal language, and classes.

Examples have `x`, shape=(batch, time), ids, filled up with padding. Losses and
accuracies are means over tokens, each of which counts the same: an example
weighs as much as it has tokens to predict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  Task,
  Variables,
  validate,
)
from fedjax_sim.tasks.ids import check_ids
from fedjax_sim.tasks.losses import negative_log_likelihood
from fedjax_sim.tasks.nnx import nnx_task

Make = Callable[[nnx.Rngs], nnx.Module]  # the module: ids -> logits
FRACTION = "mask_fraction"
_MASKED, _KEPT = 0.8, 0.1  # shares of the chosen tokens; the rest is random
_STREAM = 0x6D61736B  # folded into a step's key, apart from dropout's
_EVALUATED = 0x6576616C  # what masks are drawn from in evaluation
_FACTOR = 0x9E3779B1  # odd, so that its powers differ


# --- losses over tokens -------------------------------------------------------


def _token_values(
  logits: Array, labels: Array, counted: Array, smoothing: float
) -> tuple[Array, Array]:
  """Return each token's loss and its weight, shape=(batch, time), float32.

  Args:
    logits: shape=(batch, time, vocabulary).
    labels: shape=(batch, time), integer.
    counted: shape=(batch, time), bool; whether a token is to be predicted.
    smoothing: share of the label that is spread over the vocabulary.
  """
  values = negative_log_likelihood(logits, labels)
  if smoothing:
    logs = jax.nn.log_softmax(logits.astype(values.dtype), axis=-1)
    values = (1 - smoothing) * values - smoothing * logs.mean(-1)
  weights = counted.astype(values.dtype)
  return jnp.where(counted, values, 0), weights


def _token_task(
  make: Make,
  told: Callable[[Examples], tuple[Array, Array]],
  check: Callable[[Mapping[str, np.ndarray]], None],
  smoothing: float,
) -> Task:
  """Return a task whose loss and accuracy are means over tokens.

  Args:
    make: of the module.
    told: examples -> labels and which of them count, shape=(batch, time).
    check: see `Task.check`.
    smoothing: see `_token_values`.
  """

  def loss(logits: Array, examples: Examples) -> tuple[Array, Array]:
    values, weights = _token_values(logits, *told(examples), smoothing)
    count = weights.sum(-1)
    return values.sum(-1) / jnp.maximum(count, 1), count

  def metrics(logits: Array, examples: Examples) -> dict[str, Metric]:
    labels, counted = told(examples)
    hits = (jnp.argmax(logits, axis=-1) == labels) & counted
    total, weight = (x.astype(jnp.float32).sum(-1) for x in (hits, counted))
    return {"accuracy": Metric(total, weight)}

  return nnx_task(make, loss=loss, metrics=metrics, check=check)


# --- causal language ----------------------------------------------------------


def causal_language_task(
  make: Make,
  *,
  vocabulary: int,
  padding_id: int = 0,
  label_smoothing: float = 0.0,
) -> Task:
  """Return the task of predicting at every position the token after it.

  Args:
    make: `nnx.Rngs` -> a module, ids (batch, time) -> logits (batch, time,
      vocabulary).
    vocabulary: how many ids there are.
    padding_id: of labels that do not count; -1: all count.
    label_smoothing: share of each label that is spread over the vocabulary.

  Examples have `y`, shape=(batch, time): the token after each of `x`.

  Raises:
    TypeError, ValueError: a number out of range.
  """
  smoothing = validate.number("label_smoothing", label_smoothing, ge=0, lt=1)

  def check(examples: Mapping[str, np.ndarray]) -> None:
    x = examples.get("x", np.zeros((0, 0), int))
    y = examples.get("y", x)
    if y.ndim != 2:
      raise ValueError(
        f"'y' has shape {y.shape[1:]} an example, and"
        " model.objective='causal' predicts the token after every position;"
        " give y the shape of x, or set model.objective='classification'."
      )
    check_ids(x, vocabulary, "model.vocabulary")
    check_ids(y, vocabulary, "model.vocabulary", "y")

  def told(examples: Examples) -> tuple[Array, Array]:
    y = examples["y"].astype(jnp.int32)  # an unsigned one is no -1
    return y, y != padding_id

  return _token_task(make, told, check, smoothing)


# --- masked language ----------------------------------------------------------


def masked_language_task(
  make: Make,
  *,
  vocabulary: int,
  mask_id: int,
  padding_id: int = 0,
  special_ids: Sequence[int] = (),
  mask_fraction: float = 0.15,
  label_smoothing: float = 0.0,
) -> Task:
  """Return the task of predicting tokens that are hidden (Devlin et al. 2019).

  A share of the tokens is chosen at random; of these 80 % become the mask, 10 %
  another token, and 10 % stay. Training draws them in every step, evaluation
  from what an example holds, so that its metrics are always the same. The
  logits of `Task.logits` are those of `x` as it is.

  Args:
    make: as in `causal_language_task`.
    vocabulary: how many ids there are.
    mask_id: what stands for a hidden token.
    padding_id: of what is never chosen; -1: there is none.
    special_ids: further ids that are never chosen, such as those that begin and
      end a text.
    mask_fraction: share of the tokens that is chosen; the hyper-parameter
      `task.mask_fraction`. Evaluation keeps the value given here.
    label_smoothing: share of each label that is spread over the vocabulary.

  Raises:
    TypeError, ValueError: a number out of range.
  """
  fraction = validate.number(FRACTION, mask_fraction, gt=0, le=1)
  smoothing = validate.number("label_smoothing", label_smoothing, ge=0, lt=1)
  mask_id = validate.integer("mask_id", mask_id, ge=0, le=vocabulary - 1)
  kept = sorted({padding_id, *special_ids, mask_id})
  for i in special_ids:
    validate.integer("special_ids", i, ge=0, le=vocabulary - 1)

  def check(examples: Mapping[str, np.ndarray]) -> None:
    x = examples.get("x", np.zeros((0, 0), int))
    check_ids(x, vocabulary, "model.vocabulary")

  def masked(key: Key, ids: Array, share: Array) -> tuple[Array, Array]:
    """Return what a model sees of an example, and what is chosen, (time,)."""
    which, how, what = jax.random.split(key, 3)
    free = jnp.all(ids[:, None] != jnp.asarray(kept, ids.dtype)[None], axis=1)
    chosen = free & (jax.random.uniform(which, ids.shape) < share)
    dice = jax.random.uniform(how, ids.shape)
    others = vocabulary - (padding_id >= 0)
    random = jax.random.randint(what, ids.shape, 0, others, ids.dtype)
    if padding_id >= 0:  # no token turns into padding
      random = random + (random >= padding_id).astype(ids.dtype)
    random = jnp.where(dice < _MASKED + _KEPT, ids, random)
    hidden = jnp.where(dice < _MASKED, jnp.asarray(mask_id, ids.dtype), random)
    return jnp.where(chosen, hidden, ids), chosen

  def told(examples: Examples) -> tuple[Array, Array]:
    return examples["labels"], examples["chosen"]

  def with_masks(keys: Key, examples: Examples, share: Array) -> Examples:
    ids = examples["x"].astype(jnp.int32)  # its own may be too narrow
    seen, chosen = jax.vmap(masked)(keys, ids, share)
    return {**examples, "x": seen, "labels": ids, "chosen": chosen}

  base = _token_task(make, told, check, smoothing)

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    batch = examples["x"].shape[:1]
    keys = jax.random.split(jax.random.fold_in(key, _STREAM), batch)
    share = examples.get(FRACTION, jnp.full(batch, fraction))
    return base.loss(variables, with_masks(keys, examples, share), key)

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    ids = examples["x"].astype(jnp.int32)
    share = jnp.full(ids.shape[:1], fraction)
    keys = _keys_of(ids, padding_id)
    return base.metrics(variables, with_masks(keys, examples, share))

  return base._replace(loss=loss, metrics=metrics, hparams={FRACTION: fraction})


def _keys_of(ids: Array, padding_id: int) -> Key:
  """Return a key for each example that depends on its tokens alone.

  Args:
    ids: shape=(batch, time).
    padding_id: what does not count.
  """
  length = ids.shape[1]
  powers = np.cumprod(np.full(length, _FACTOR, np.uint32), dtype=np.uint32)
  tokens = jnp.where(ids != padding_id, ids + 1, 0).astype(jnp.uint32)
  hashes = jnp.sum(tokens * powers[None], axis=1, dtype=jnp.uint32)
  key = jax.random.key(_EVALUATED)
  keys: Key = jax.vmap(lambda data: jax.random.fold_in(key, data))(hashes)
  return keys


# --- classes ------------------------------------------------------------------


def sequence_classification_task(make: Make, *, vocabulary: int) -> Task:
  """Return the task of naming the class of a text, with cross-entropy.

  Args:
    make: `nnx.Rngs` -> a module, ids (batch, time) -> logits (batch, classes).
    vocabulary: how many ids there are.

  Examples have `y`, shape=(batch,): the class of each.
  """

  def check(examples: Mapping[str, np.ndarray]) -> None:
    y = examples.get("y", np.zeros(0, int))
    if y.ndim != 1:
      raise ValueError(
        f"'y' has shape {y.shape[1:]} an example, and"
        " model.objective='classification' predicts one class; give y a"
        " number an example, or set another objective."
      )
    x = examples.get("x", np.zeros((0, 0), int))
    check_ids(x, vocabulary, "model.vocabulary")

  return nnx_task(make, check=check)
