"""Every model of the registry, and each against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.models import MODELS
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from problems import blobs, make_simulator, sgd

CLASSES = 3
KEY = jax.random.key(0)


def batch_of(shape, size=5):
  rng = np.random.default_rng(0)
  return {
    "x": rng.normal(size=(size, *shape)).astype(np.float32),
    "y": rng.integers(0, CLASSES, size).astype(np.int32),
  }


def cross_entropy(logits, y):
  norm = np.log(np.exp(logits).sum(1))
  return norm - logits[np.arange(len(y)), y]


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_an_example_is_judged_by_itself(name, shape):
  """Losses and metrics of an example do not depend on the rest of its batch."""
  task = MODELS[name](shape, CLASSES)
  examples = batch_of(shape)
  variables = jax.jit(task.init)(KEY)
  loss = jax.jit(task.loss)(variables, examples, KEY)
  assert loss.value.shape == loss.weight.shape == (5,)
  np.testing.assert_array_equal(loss.weight, np.ones(5))
  part = jax.tree.map(lambda x: x[1:3], examples)
  np.testing.assert_allclose(
    jax.jit(task.loss)(variables, part, KEY).value,
    loss.value[1:3],
    rtol=1e-5,
  )
  out = jax.jit(task.metrics)(variables, examples)
  np.testing.assert_allclose(out["loss"].total, loss.value, rtol=1e-5)
  assert out["accuracy"].total.shape == (5,)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns(name):
  data = blobs([12, 9, 15, 10])
  task = MODELS[name](data.example_shape, CLASSES)
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  rows = []
  for out in simulator.run(simulator.init(), 10):
    rows += out.rows
  assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]


def test_logistic_regression_is_linear_and_starts_from_zeros():
  task = logistic_regression((2, 3), CLASSES)
  variables = task.init(KEY)
  shapes = jax.tree.map(lambda x: x.shape, jax.tree.leaves(variables))
  assert shapes == [(3,), (6, 3)]
  assert not any(np.any(x) for x in jax.tree.leaves(variables))
  examples = batch_of((2, 3))
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), variables
  )
  bias, kernel = (np.asarray(x) for x in jax.tree.leaves(variables))
  logits = examples["x"].reshape(5, 6) @ kernel + bias
  np.testing.assert_allclose(
    task.loss(variables, examples, KEY).value,
    cross_entropy(logits, examples["y"]),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(
    task.metrics(variables, examples)["accuracy"].total,
    logits.argmax(1) == examples["y"],
  )


def test_mlp_has_relu_between_its_layers():
  task = mlp((2, 3), CLASSES, (5, 4))
  variables = jax.jit(task.init)(KEY)
  shapes = [x.shape for x in jax.tree.leaves(variables)]
  assert shapes == [(5,), (6, 5), (4,), (5, 4), (3,), (4, 3)]
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), variables
  )
  examples = batch_of((2, 3))
  h = np.asarray(examples["x"].reshape(5, 6), np.float64)
  arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(variables)]
  for i in range(0, 6, 2):
    h = h @ arrays[i + 1] + arrays[i]
    h = np.maximum(h, 0) if i < 4 else h
  np.testing.assert_allclose(
    task.loss(variables, examples, KEY).value,
    cross_entropy(h, examples["y"]),
    rtol=1e-4,
  )


def test_mlp_without_hidden_layers_is_linear():
  variables = mlp((6,), CLASSES, ()).init(KEY)
  assert [x.shape for x in jax.tree.leaves(variables)] == [(3,), (6, 3)]


@pytest.mark.parametrize(
  ("sizes", "error", "match"),
  [
    ((8, 0), ValueError, "model.hidden_sizes=0 is out of range"),
    ((8.0,), TypeError, "model.hidden_sizes=8.0 is a float"),
  ],
)
def test_mlp_refuses_sizes(sizes, error, match):
  with pytest.raises(error, match=match):
    mlp((6,), CLASSES, sizes)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_needs_classes(name):
  with pytest.raises(ValueError, match="num_classes=0 is out of range"):
    MODELS[name]((6,), 0)
