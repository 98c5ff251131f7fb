"""Losses over tokens, and which of them are hidden, against counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_sim.core import Task
from fedjax_sim.tasks.transformers import (
  causal_language_task,
  masked_language_task,
  sequence_classification_task,
)

VOCABULARY, MASK, SPECIAL = 40, 39, (1, 2)
KEY = jax.random.key(0)


class Echo(nnx.Module):
  """Says what it saw: one-hot ids, times a number, plus a bias."""

  def __init__(self, rngs: nnx.Rngs):
    del rngs
    self.scale = nnx.Param(jnp.float32(5))

  def __call__(self, ids: jax.Array) -> jax.Array:
    return self.scale[...] * jax.nn.one_hot(ids, VOCABULARY)


def masked(**options) -> Task:
  return masked_language_task(
    Echo,
    vocabulary=VOCABULARY,
    mask_id=MASK,
    special_ids=SPECIAL,
    **options,
  )


def seen_by(task, ids, key):
  """Return what the model saw, and which tokens counted, of one step."""
  seen: dict[str, np.ndarray] = {}

  class Spy(Echo):
    def __call__(self, ids):
      jax.debug.callback(lambda x: seen.update(x=np.asarray(x)), ids)
      return super().__call__(ids)

  spying = masked_language_task(
    Spy, vocabulary=VOCABULARY, mask_id=MASK, special_ids=SPECIAL, **task
  )
  variables = spying.init(KEY)
  loss = jax.jit(spying.loss)(variables, {"x": ids}, key)
  jax.effects_barrier()
  return seen["x"], np.asarray(loss.weight)


def test_a_share_is_hidden_in_three_ways():
  rng = np.random.default_rng(0)
  ids = rng.integers(3, MASK, (200, 100)).astype(np.int32)
  ids[:, 0], ids[:, 50], ids[:, 90:] = *SPECIAL, 0
  seen, weight = seen_by({"mask_fraction": 0.2}, ids, KEY)
  free = 200 * 88
  chosen = weight.sum()
  # Within five standard deviations of a binomial.
  near = lambda found, n, p: abs(found - n * p) < 5 * (n * p * (1 - p)) ** 0.5
  assert near(chosen, free, 0.2)
  hidden = (seen == MASK).sum()
  other = ((seen != ids) & (seen != MASK)).sum()
  assert near(hidden, chosen, 0.8)
  # A random token is the mask, or the old one, once in a while.
  assert near(other, chosen, 0.1 * (VOCABULARY - 3) / (VOCABULARY - 1))
  kept = (ids <= 2) & (ids >= 0)
  np.testing.assert_array_equal(seen[kept], ids[kept])
  assert not np.any((seen == 0) & (ids != 0))  # none turns into padding
  replaced = seen[(seen != ids) & (seen != MASK)]
  assert len(np.unique(replaced)) > 30


def test_each_step_hides_others_and_evaluation_always_the_same():
  ids = np.random.default_rng(0).integers(3, MASK, (4, 30)).astype(np.int32)
  ids[3] = ids[0]
  task = masked()
  variables = task.init(KEY)
  loss, metrics = jax.jit(task.loss), jax.jit(task.metrics)
  one, other = (
    loss(variables, {"x": ids}, jax.random.key(i)).value for i in (1, 2)
  )
  assert np.any(one != other)
  assert one[0] != one[3]  # equal examples are hidden apart
  first = metrics(variables, {"x": ids})
  # An example's does not depend on the others, nor on its place.
  second = metrics(variables, {"x": ids[::-1]})
  for name, metric in first.items():
    np.testing.assert_array_equal(metric.total, second[name].total[::-1])
    assert metric.total[0] == metric.total[3]
  assert len(np.unique(first["loss"].total)) == 3


def test_masked_losses_are_of_the_chosen_tokens():
  ids = np.random.default_rng(0).integers(3, MASK, (6, 50)).astype(np.int32)
  seen, weight = seen_by({}, ids, KEY)
  task = masked()
  loss = jax.jit(task.loss)(task.init(KEY), {"x": ids}, KEY)
  # A token that the model saw is right, all others are equally wrong.
  norm = np.log(np.exp(5) + VOCABULARY - 1)
  wrong = (seen != ids).sum(1)
  expected = (weight * norm - 5 * (weight - wrong)) / np.maximum(weight, 1)
  np.testing.assert_allclose(loss.value, expected, rtol=1e-5)
  np.testing.assert_array_equal(loss.weight, weight)
  found = jax.jit(task.metrics)(task.init(KEY), {"x": ids})
  share = found["accuracy"].total.sum() / found["accuracy"].weight.sum()
  assert 0 < share < 0.3  # those that stayed


def test_the_share_is_a_hyper_parameter():
  task = masked(mask_fraction=0.5)
  assert task.hparams == {"mask_fraction": 0.5}
  ids = np.random.default_rng(0).integers(3, MASK, (50, 40)).astype(np.int32)
  variables = task.init(KEY)
  loss, metrics = jax.jit(task.loss), jax.jit(task.metrics)
  weights = {}
  for share in (0.1, 0.5):
    examples = {"x": ids, "mask_fraction": jnp.full(50, share)}
    weights[share] = float(loss(variables, examples, KEY).weight.sum())
    # Evaluation goes on as it began, so that its metrics are comparable.
    counted = float(metrics(variables, examples)["loss"].weight.sum())
    assert 900 < counted < 1100
  assert 120 < weights[0.1] < 280
  assert 900 < weights[0.5] < 1100


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_causal_losses_are_of_the_next_tokens(padding, smoothing):
  rng = np.random.default_rng(0)
  x, y = (rng.integers(8, 40, (3, 5)).astype(np.int32) for _ in range(2))
  y[0, :3], y[1, 3:], y[2] = x[0, :3], padding, padding
  task = causal_language_task(
    Echo, vocabulary=40, padding_id=padding, label_smoothing=smoothing
  )
  variables = task.init(KEY)
  loss = jax.jit(task.loss)(variables, {"x": x, "y": y}, KEY)
  assert loss.weight.tolist() == [5, 3, 0]
  logits = 5.0 * np.eye(40)[x]
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  labels = (1 - smoothing) * np.eye(40)[y] + smoothing / 40
  values = -(labels * logs).sum(-1) * (y != padding)
  count = np.maximum(loss.weight, 1)
  np.testing.assert_allclose(loss.value, values.sum(1) / count, rtol=1e-5)
  found = jax.jit(task.metrics)(variables, {"x": x, "y": y})
  np.testing.assert_allclose(found["loss"].total, values.sum(1), rtol=1e-5)
  assert found["accuracy"].total.tolist()[0] >= 3
  assert found["accuracy"].weight.tolist() == [5, 3, 0]


def test_a_model_without_padding_learns_every_token():
  task = causal_language_task(Echo, vocabulary=40, padding_id=-1)
  zeros = np.zeros((2, 5), np.int32)
  examples = {"x": zeros, "y": zeros}
  loss = jax.jit(task.loss)(task.init(KEY), examples, KEY)
  assert loss.weight.tolist() == [5, 5]


def test_ids_that_no_model_has_are_refused():
  good = np.full((2, 5), 39)
  tasks = (
    masked(),
    causal_language_task(Echo, vocabulary=40),
    sequence_classification_task(Echo, vocabulary=40),
  )
  for task, y in zip(tasks, (good, good, np.zeros(2, int)), strict=True):
    task.check({"x": good, "y": y})
    for bad in (40, -1):
      with pytest.raises(ValueError, match=rf"'x' holds {bad}; model\.vocab"):
        task.check({"x": np.full((2, 5), bad), "y": y})
    with pytest.raises(ValueError, match="'x' is float64; give whole numbers"):
      task.check({"x": good / 2, "y": y})
  with pytest.raises(ValueError, match="'y' holds 40; model"):
    tasks[1].check({"x": good, "y": good + 1})
  with pytest.raises(ValueError, match="'causal' predicts the token after"):
    tasks[1].check({"x": good, "y": np.zeros(2, int)})
  with pytest.raises(ValueError, match="'classification' predicts one class"):
    tasks[2].check({"x": good, "y": good})


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16])
def test_narrow_ids_are_as_wide_ones(dtype):
  """-1, for no padding, is none of them, and a mask may be beyond them."""
  ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
  wide, narrow = (
    {"x": jnp.asarray(ids, kind), "y": jnp.asarray(ids, kind)}
    for kind in (np.int32, dtype)
  )
  beyond = masked_language_task(
    Echo, vocabulary=300, mask_id=299, padding_id=-1
  )
  plain = causal_language_task(Echo, vocabulary=VOCABULARY, padding_id=-1)
  for task in (plain, beyond):
    variables = task.init(KEY)
    expected, found = (task.loss(variables, x, KEY) for x in (wide, narrow))
    np.testing.assert_array_equal(found.value, expected.value)
    told = [task.metrics(variables, x) for x in (wide, narrow)]
    jax.tree.map(np.testing.assert_array_equal, *told)
