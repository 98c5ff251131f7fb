"""Frozen parameters stay, and the others train as if those were constants."""

import jax
import numpy as np
import pytest
from flax import nnx

from fedjax_sim.algorithms import fedavg, fedprox
from fedjax_sim.config import build, complete, default_config
from fedjax_sim.config.build import build_data, build_task
from fedjax_sim.core.tree import paths_of
from fedjax_sim.data import load_digits
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from fedjax_sim.tasks import nnx_task
from fedjax_sim.tasks.freezing import (
  named_variables,
  with_frozen,
  with_kept_buffers,
)
from fedjax_sim.tasks.initial import with_initial
from fedjax_sim.training.optimizers import optimizer
from problems import blobs, flat, make_simulator, sgd, train
from tiers import slow_but


def by_path(params):
  return dict(zip(paths_of(params), jax.tree.leaves(params), strict=True))


def run(task, data, *, make=fedavg.fedavg, devices=1, rounds=3):
  algorithm = make(task, optimizer("adam", learning_rate=0.05), sgd(1.0))
  simulator = make_simulator(
    task, algorithm, data, batching=LocalBatching(batch_size=4), devices=devices
  )
  state = train(simulator, rounds)
  assert simulator.compilations == 1
  return simulator, jax.device_get(algorithm.variables(state.server))


@pytest.mark.parametrize(
  ("make", "devices"),
  slow_but(
    [(fedprox.fedprox, 2)],
    [(make, n) for make in (fedavg.fedavg, fedprox.fedprox) for n in (1, 2)],
  ),
)
def test_what_is_frozen_stays_and_the_rest_trains(make, devices):
  data = blobs([9, 5, 7])
  task = with_frozen(
    mlp(data.example_shape, data.num_classes, (8,)), ("layers/0/",)
  )
  simulator, after = run(task, data, make=make, devices=devices)
  before = jax.device_get(
    simulator.algorithm.variables(simulator.init().server)
  )
  assert set(by_path(after.params)) == {"layers/1/bias", "layers/1/kernel"}
  np.testing.assert_array_equal(flat(after.frozen), flat(before.frozen))
  for path, value in by_path(after.params).items():
    assert np.abs(value - by_path(before.params)[path]).max() > 1e-3


def test_logits_take_what_is_frozen_too():
  data = blobs([9])
  task = mlp(data.example_shape, data.num_classes, (8,))
  frozen = with_frozen(task, ("layers/0/",))
  key, examples = jax.random.key(0), data.train.examples
  of = lambda task: jax.jit(task.logits)(task.init(key), examples)
  np.testing.assert_array_equal(of(frozen), of(task))


def test_a_frozen_bias_is_a_model_without_one():
  """The bias begins at 0 and stays there."""
  data = blobs([9, 5, 7])
  plain = logistic_regression(data.example_shape, data.num_classes)
  (bias,) = [
    p for p in paths_of(plain.init(jax.random.key(0)).params) if "bias" in p
  ]
  _, after = run(with_frozen(plain, (f"{bias}$",)), data)

  def loss(variables, examples, key):
    params = variables.params
    leaves = [
      jax.lax.stop_gradient(x) if path == bias else x
      for path, x in by_path(params).items()
    ]
    whole = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return plain.loss(variables._replace(params=whole), examples, key)

  _, expected = run(plain._replace(loss=loss), data)
  rest = {k: v for k, v in by_path(expected.params).items() if k != bias}
  for path, value in by_path(after.params).items():
    np.testing.assert_allclose(value, rest[path], rtol=1e-5, atol=1e-6)


def test_fewer_bytes_are_sent():
  data = blobs([9, 5, 7])
  task = mlp(data.example_shape, data.num_classes, (8,))
  whole, part = (
    make_simulator(t, fedavg.fedavg(t, sgd(0.1), sgd(1.0)), data)
    for t in (task, with_frozen(task, ("layers/0/",)))
  )
  assert whole.traffic.up - part.traffic.up == 4 * (6 * 8 + 8)
  assert part.states.num_parameters == 8 * 3 + 3


def test_a_config_freezes():
  config = default_config()
  config.model.name = "mlp"
  config.model.frozen = ("layers/1",)
  simulator = build.build(config).simulator
  params = simulator.algorithm.variables(simulator.states.shapes.server).params
  assert all(path.startswith("layers/0/") for path in paths_of(params))


@pytest.mark.parametrize(
  ("patterns", "error", "match"),
  [
    (("layers/7",), ValueError, r"'layers/7' matches no parameter; there are "),
    (("kernel",), ValueError, "matches no parameter"),
    (("(",), ValueError, "is no regular expression"),
    ((3,), ValueError, "is no regular expression"),
    (("layers",), ValueError, "freezes all parameters"),
    ("layers/0", TypeError, "is a text; give a tuple"),
  ],
)
def test_patterns_that_are_refused(patterns, error, match):
  data = load_digits(num_clients=5)
  task = mlp(data.example_shape, data.num_classes)
  with pytest.raises(error, match=match) as caught:
    with_frozen(task, patterns)
  assert str(caught.value).startswith("model.frozen=")


# --- buffers ------------------------------------------------------------------


class Normed(nnx.Module):
  """Batch normalization, and a linear layer."""

  def __init__(self, features, classes, rngs):
    self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
    self.linear = nnx.Linear(features, classes, rngs=rngs)

  def __call__(self, x):
    return self.linear(self.norm(x))


def normed(data):
  (features,), classes = data.example_shape, data.num_classes
  return nnx_task(lambda rngs: Normed(features, classes, rngs))


def trained_once(task, data, devices=1):
  """A simulator, and the model after a round of a step by each client."""
  algorithm = fedavg.fedavg(task, sgd(0.1), sgd(1.0))
  # All examples of a client are a batch, so their order does not matter.
  batching = LocalBatching(batch_size=int(data.train.sizes.max()))
  simulator = make_simulator(
    task, algorithm, data, batching=batching, devices=devices
  )
  state = train(simulator, 1)
  return simulator, algorithm.variables(state.server)


@pytest.mark.parametrize("devices", slow_but([2], [1, 2]))
def test_running_statistics_are_averaged_or_kept(devices):
  data = blobs([9, 9, 9])
  task = normed(data)
  sending, after = trained_once(task, data, devices)
  keeping, still = trained_once(with_kept_buffers(task), data, devices)
  found = named_variables(after)
  clients = data.train.examples["x"].astype(np.float64).reshape(3, 9, 6)
  for name, began, of in (("mean", 0, np.mean), ("var", 1, np.var)):
    seen = 0.9 * began + 0.1 * of(clients, axis=1)
    key = f"buffers/norm/{name}"
    np.testing.assert_allclose(
      found[key], seen.mean(axis=0), rtol=1e-4, atol=1e-6
    )
    left = named_variables(still)[key]
    np.testing.assert_array_equal(left, np.full(6, began, np.float32))
  np.testing.assert_allclose(flat(still.params), flat(after.params), rtol=1e-6)
  assert sending.traffic.up - keeping.traffic.up == 4 * 2 * 6


def test_evaluation_takes_the_statistics_that_are_kept():
  data = blobs([9])
  task = normed(data)
  x = data.train.examples["x"].astype(np.float64)
  mean, var = x.mean(axis=0), x.var(axis=0)
  begun = with_initial(
    task,
    {
      f"buffers/norm/{name}": value.astype(np.float32)
      for name, value in (("mean", mean), ("var", var))
    },
    only=("buffers/",),
  )
  # In any order, and beside frozen parameters.
  for made in (
    with_kept_buffers(with_frozen(begun, ("norm/",))),
    with_frozen(with_kept_buffers(begun), ("norm/",)),
  ):
    variables = made.init(jax.random.key(0))
    assert variables.buffers == ()
    found = named_variables(variables)
    expected = (
      (x - mean)
      / np.sqrt(var + 1e-5)
      @ np.asarray(found["linear/kernel"], np.float64)
    )
    assert made.logits
    logits = jax.jit(made.logits)(variables, data.train.examples)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-5)


def test_a_config_keeps_buffers_in_their_precision():
  config = default_config()
  config.data.reshape = (8, 8, 1)
  config.model.name = "resnet"
  config.model.width, config.model.norm = 2, "batch"
  config.runtime.compute_dtype = "bfloat16"
  config.model.send_buffers = False
  config = complete(config)
  shapes = jax.eval_shape(
    build_task(config, build_data(config)).init, jax.random.key(0)
  )
  assert shapes.buffers == ()
  assert named_variables(shapes)["buffers/norm/mean"].dtype == np.float32


def test_what_has_no_buffers_keeps_none():
  config = default_config()
  config.model.send_buffers = False
  with pytest.raises(ValueError, match="send_buffers=False: .* has no buff"):
    build.build(config)
