"""Predictions outside of a run see what the engine's model sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import predict
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.data import FederatedData, make_dataset
from fedjax_sim.data.batch_steps import from_bytes
from fedjax_sim.data.preprocess import (
  with_lookup,
  with_normalization,
  with_padding,
  with_reshape,
)
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.tasks import function_task
from problems import make_simulator, sgd

MEAN, STDDEV = 0.4, 0.25
TABLE = np.array([2, 0, 1])
RNG = np.random.default_rng(0)


def examples_of(count):
  return {
    "x": RNG.integers(0, 256, (count, 12), dtype=np.uint8),
    "y": RNG.integers(0, 3, count).astype(np.int64),
  }


@pytest.fixture(scope="module")
def data():
  """Images as bytes, normalized, framed by zeros; labels by a table."""
  clients = {"a": examples_of(20), "b": examples_of(30)}
  made = make_dataset(
    "bytes",
    FederatedData.from_clients(clients),
    num_classes=3,
    prepare=from_bytes,
  )
  made = with_reshape(made, (3, 4))
  made = with_padding(with_normalization(made, MEAN, STDDEV), (5, 6))
  made = with_lookup(made, TABLE, "y")
  return dataclasses.replace(made, test=examples_of(23), seen=None)


def by_numpy(x):
  x = (x.reshape(-1, 3, 4) / 255 - MEAN) / STDDEV
  return np.pad(x, ((0, 0), (1, 1), (1, 1))).reshape(len(x), -1)


def test_predictions_are_of_what_the_engine_evaluates(data):
  task = logistic_regression(data.example_shape, data.num_classes)
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  state = simulator.init()
  model = state.server.variables
  rng = np.random.default_rng(1)  # not zeros
  model = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model
  )
  server = state.server._replace(variables=model)
  row = simulator.evaluate(state._replace(server=server))

  test = data.test
  logits = predict(task, model, data, {"x": test["x"]}, batch_size=10)
  bias, kernel = (np.asarray(x, np.float64) for x in jax.tree.leaves(model))
  expected = by_numpy(test["x"]) @ kernel + bias
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  labels = TABLE[test["y"]]
  hits = np.mean(logits.argmax(1) == labels)
  np.testing.assert_allclose(hits, row["test/accuracy"], rtol=1e-6)
  log = expected - np.log(np.exp(expected).sum(1, keepdims=True))
  loss = -log[np.arange(23), labels].mean()
  np.testing.assert_allclose(loss, row["test/loss"], rtol=1e-4)

  assert task.logits is not None
  by_hand = task.logits(model, data.prepare({"x": test["x"]}))
  np.testing.assert_allclose(by_hand, logits, rtol=1e-4, atol=1e-4)
  wide = {"x": test["x"].astype(np.int64)}
  wider = predict(task, model, data, wide, batch_size=10)
  np.testing.assert_array_equal(wider, logits)


@pytest.mark.parametrize(
  ("examples", "message"),
  [
    (
      {"x": np.zeros((2, 12), np.float32)},
      r"'x' holds floats .*stores whole numbers of shape \(12,\).* before",
    ),
    ({"x": np.zeros((2, 5, 6), np.uint8)}, r"of shape \(5, 6\), and the data"),
    ({"x": np.full((2, 12), 256)}, "from 256 to 256, beyond uint8"),
    ({"z": np.zeros(2)}, "predict: field='z' is unknown"),
    ({"x": np.zeros((0, 12), np.uint8)}, "there is no example"),
  ],
)
def test_examples_that_are_not_as_they_are_stored(data, examples, message):
  task = logistic_regression(data.example_shape, data.num_classes)
  model = task.init(jax.random.key(0))
  with pytest.raises(ValueError, match=message):
    predict(task, model, data, examples)


@pytest.mark.parametrize("examples", [np.zeros((2, 12), np.uint8), None, [1]])
def test_examples_without_a_field(data, examples):
  task = logistic_regression(data.example_shape, data.num_classes)
  model = task.init(jax.random.key(0))
  message = r'examples are a \w+; give field -> array, such as \{"x": x\}'
  with pytest.raises(TypeError, match=message):
    predict(task, model, data, examples)


def test_params_are_no_variables(data):
  task = logistic_regression(data.example_shape, data.num_classes)
  model = task.init(jax.random.key(0))
  with pytest.raises(TypeError, match="give Variables, .* not the params"):
    predict(task, model.params, data, data.test)


def test_a_task_without_logits(data):
  task = function_task(lambda key: jnp.zeros(2), lambda p, e: e["x"][:, 0])
  with pytest.raises(ValueError, match="tells its logits"):
    predict(task, task.init(jax.random.key(0)), data, data.test)
