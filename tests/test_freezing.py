"""Frozen parameters stay, and the others train as if those were constants."""

import jax
import numpy as np
import pytest

from fedjax_sim.algorithms import fedavg, fedprox
from fedjax_sim.config import build, default_config
from fedjax_sim.core.tree import paths_of
from fedjax_sim.data import load_digits
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from fedjax_sim.tasks.freezing import with_frozen
from fedjax_sim.training.optimizers import optimizer
from problems import blobs, flat, make_simulator, sgd, train


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


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("make", [fedavg.fedavg, fedprox.fedprox])
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
