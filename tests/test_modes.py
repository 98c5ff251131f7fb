"""Training modes, and parameters that are not trained, of all tasks."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.simulation.preflight import ModelError
from fedjax_sim.tasks import function_task, linen_task, nnx_task
from problems import blobs, flat, make_simulator, sgd, train

FEATURES, HIDDEN, CLASSES = 6, 5, 3
MOMENTUM = 0.5
KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, FEATURES), jnp.float32)


class Net(linen.Module):
  """Batch norm and dropout, whose modes have two arguments, both inverted."""

  @linen.compact
  def __call__(self, x, *, deterministic, use_running_average):
    h = linen.Dense(HIDDEN)(x)
    h = linen.BatchNorm(use_running_average, momentum=MOMENTUM)(h)
    h = linen.Dropout(0.5)(h, deterministic=deterministic)
    return linen.Dense(CLASSES)(h)


class Fixed(linen.Module):
  """Dropout or batch norm that never learns of training."""

  layer: linen.Module

  @linen.compact
  def __call__(self, x):
    return linen.Dense(CLASSES)(self.layer(x))


def inverted(train):
  return {"deterministic": not train, "use_running_average": not train}


def test_arguments_of_linen_modules_follow_the_mode():
  task = linen_task(Net(), X, apply_kwargs=inverted)
  variables = task.init(KEY)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, FEATURES)).astype(np.float32)
  examples = {"x": x, "y": np.zeros(8, np.int32)}
  first, last = (
    [np.asarray(variables.params[k][p], np.float64) for p in ("kernel", "bias")]
    for k in ("Dense_0", "Dense_1")
  )
  h = x @ first[0] + first[1]
  # In evaluation: statistics of the start, and no dropout.
  expected = h / np.sqrt(1 + 1e-5) @ last[0] + last[1]
  assert task.logits is not None
  logits = jax.jit(task.logits)(variables, examples)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  # In training: statistics of the batch are learned, and keys drop units.
  losses = [
    jax.jit(task.loss)(variables, examples, jax.random.key(i))
    for i in (0, 0, 1)
  ]
  mean = losses[0].buffers["batch_stats"]["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(mean, (1 - MOMENTUM) * h.mean(0), rtol=1e-4)
  np.testing.assert_array_equal(losses[0].value, losses[1].value)
  assert not np.array_equal(losses[0].value, losses[2].value)


@pytest.mark.parametrize(
  ("layer", "kind"),
  [
    (linen.Dropout(0.5, deterministic=True), "Dropout"),
    (linen.BatchNorm(use_running_average=True), "BatchNorm"),
    (
      linen.MultiHeadDotProductAttention(
        2, dropout_rate=0.5, deterministic=True
      ),
      "MultiHeadDotProductAttention",
    ),
  ],
)
def test_layers_that_do_not_know_of_training_are_named(layer, kind):
  with pytest.warns(UserWarning, match=f"Fixed has .*{kind}.*apply_kwargs"):
    linen_task(Fixed(layer), X)


def test_a_mode_that_never_changes_is_warned_of():
  always = lambda train: inverted(False)
  with pytest.warns(UserWarning, match="Net has BatchNorm, Dropout, and is"):
    linen_task(Net(), X, apply_kwargs=always)


def test_layers_without_modes_need_none():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    linen_task(Fixed(linen.LayerNorm()), X)
    linen_task(Fixed(linen.Dropout(0.0, deterministic=True)), X)
    linen_task(Net(), X, apply_kwargs=inverted)


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({}, ValueError, "Net cannot be called .*deterministic.*apply_kwargs, for"),
    ({"train_argument": "train"}, ValueError, "'train': False.* by name"),
    (
      {"apply_kwargs": lambda train: not train},
      TypeError,
      r"apply_kwargs\(False\) returned a bool, True; .*'deterministic': not",
    ),
    (
      {"apply_kwargs": inverted, "train_argument": "train"},
      ValueError,
      "train_argument='train' and apply_kwargs both",
    ),
  ],
)
def test_arguments_that_do_not_fit_are_refused(options, error, message):
  with pytest.raises(error, match=message):
    linen_task(Net(), X, **options)


# --- frozen parameters --------------------------------------------------------


def linear(params, examples):
  table = params["table"].astype(jnp.float32)
  gap = examples["x"] @ params["w"] + table[0] * params["b"] - 1.0
  return gap**2


def test_functions_have_frozen_parameters_of_any_kind():
  """Only w moves; b, and whole numbers, stay."""
  table = jnp.arange(2, 5)
  task = function_task(
    lambda key: {"w": jnp.ones(FEATURES), "b": jnp.ones(()), "table": table},
    linear,
    trainable=("w",),
  )
  data = blobs([4])
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  variables = train(simulator, 1).server.variables
  x = data.train.examples["x"].astype(np.float64)
  gap = x.sum(1) + 2 - 1
  expected = 1 - 0.1 * (2 * gap[:, None] * x).mean(0)
  np.testing.assert_allclose(flat(variables.params), expected, rtol=1e-4)
  np.testing.assert_array_equal(flat(variables.frozen), [1, 2, 3, 4])


def test_linen_modules_have_frozen_parameters():
  task = linen_task(
    Net(), X, apply_kwargs=inverted, trainable=("Dense_1/kernel", "Dense_1/b")
  )
  variables = task.init(KEY)
  whole = linen_task(Net(), X, apply_kwargs=inverted).init(KEY)
  assert [x.shape for x in jax.tree.leaves(variables.params)] == [
    (CLASSES,),
    (HIDDEN, CLASSES),
  ]
  both = flat(variables.params).size + flat(variables.frozen).size
  assert both == flat(whole.params).size
  examples = {"x": jnp.ones((3, FEATURES)), "y": jnp.zeros(3, jnp.int32)}
  np.testing.assert_allclose(
    task.metrics(variables, examples)["loss"].total,
    linen_task(Net(), X, apply_kwargs=inverted)
    .metrics(whole, examples)["loss"]
    .total,
    rtol=1e-6,
  )


def test_patterns_that_train_nothing_are_refused():
  plain = lambda **options: function_task(
    lambda key: {"w": jnp.ones(2)}, lambda p, e: e["x"], **options
  )
  with pytest.raises(
    ValueError, match="trainable.*'v' matches no parameter.*w"
  ):
    plain(trainable=("v",))
  with pytest.raises(ValueError, match=r"trainable=\(\) leaves nothing .* w\."):
    plain(trainable=())
  with pytest.raises(ValueError, match="trainable.*'Dense_7' matches no"):
    linen_task(Net(), X, apply_kwargs=inverted, trainable=("Dense_7",))


def test_a_filter_that_selects_nothing_is_refused():
  linear = lambda rngs: nnx.Linear(FEATURES, CLASSES, rngs=rngs)
  with pytest.raises(
    ValueError, match=r"trainable=LoRAParam selects none .* are Param\. Give"
  ):
    nnx_task(linear, trainable=nnx.LoRAParam)


@pytest.mark.parametrize("kind", ["linen", "function"])
def test_checks_see_the_stored_examples(kind):
  def check(examples):
    if examples["x"].max() > -100:
      raise ValueError("'x' is too large")

  task = (
    linen_task(linen.Dense(CLASSES), X, check=check)
    if kind == "linen"
    else function_task(
      lambda key: jnp.zeros(FEATURES), lambda p, e: e["x"] @ p, check=check
    )
  )
  algorithm = fedavg(task, sgd(0.1), sgd(1.0))
  with pytest.raises(ModelError, match="train: 'x' is too large"):
    _ = make_simulator(task, algorithm, blobs([4])).checked
