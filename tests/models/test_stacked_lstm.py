"""Layers that take their steps together, against one layer after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_sim.models import MODELS
from fedjax_sim.models.layers import LSTM, lstm
from fedjax_sim.models.stacked_lstm import CHUNK, read, stacked_lstm
from problems import check_same, normal


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def layer_by_layer(gates, kernels, between, biases):
  outputs = lstm(gates, kernels[0])
  for kernel, up, bias in zip(kernels[1:], between, biases, strict=True):
    outputs = lstm(outputs @ up + bias[None, None], kernel)
  return outputs


def arrays(time, batch, layers, units=4, lanes=()):
  wide = 4 * units
  return (
    normal(0, *lanes, time, batch, wide),
    normal(1, *lanes, layers, units, wide) / 2,
    normal(2, *lanes, layers - 1, units, wide) / 2,
    normal(3, *lanes, layers - 1, wide),
  )


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize(
  "time", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
)
def test_it_is_one_layer_after_the_other(time, layers):
  given = arrays(time, 3, layers)
  check_same(jax.jit(stacked_lstm), jax.jit(layer_by_layer), *given)


def test_layers_for_each_client():
  given = arrays(13, 2, 3, lanes=(3,))
  check_same(jax.vmap(stacked_lstm), jax.vmap(layer_by_layer), *given)
  gates, *shared = given[0], *(x[0] for x in given[1:])  # as in an evaluation
  lanes = (0, None, None, None)
  check_same(
    jax.vmap(stacked_lstm, lanes),
    jax.vmap(layer_by_layer, lanes),
    gates,
    *shared,
  )


def test_the_gradient_has_derivatives():
  """As hypergradients need them, in both modes."""
  given = arrays(CHUNK + 1, 2, 2)
  every = (0, 1, 2, 3)

  def slope(function):
    return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), every)

  def second(function):
    norm = lambda *a: sum(jnp.sum(x**2) for x in slope(function)(*a))
    return jax.jit(jax.grad(norm, every))(*given)

  def forward(function):
    return jax.jit(lambda *a: jax.jvp(slope(function), a, a))(*given)

  for derivative in (second, forward):
    found, expected = derivative(stacked_lstm), derivative(layer_by_layer)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
      found,
      expected,
    )


def test_gates_of_fewer_digits_than_the_kernels():
  given = arrays(12, 2, 2)
  low = given[0].astype(jnp.bfloat16)
  single = [x.astype(jnp.float32) for x in given[1:]]
  assert stacked_lstm(low, *single).dtype == jnp.bfloat16
  sums = lambda f: lambda *a: f(*a).astype(float).sum()
  got = jax.grad(sums(stacked_lstm), (0, 1, 2, 3))(low, *single)
  exact = jax.grad(sums(layer_by_layer), (0, 1, 2, 3))(*given)
  for one, other, dtype in zip(
    got, exact, (jnp.bfloat16, *[jnp.float32] * 3), strict=True
  ):
    assert one.dtype == dtype
    error = jnp.abs(one.astype(float) - other).max() / jnp.abs(other).max()
    assert float(error) < 0.05


# --- which form ---------------------------------------------------------------


def made(units, recurrent_bias=False):
  rngs = nnx.Rngs(0)
  sizes = (3, *units)
  layers = [
    LSTM(before, after, recurrent_bias=recurrent_bias, rngs=rngs)
    for before, after in zip(sizes, units, strict=False)
  ]
  for layer in layers:  # whose biases begin at zero
    wide = 4 * layer.recurrent.shape[0]
    layer.inputs.bias = nnx.Param(normal(5, wide))
    if recurrent_bias:
      layer.recurrent_bias = nnx.Param(normal(6, wide))
  return layers


@pytest.mark.parametrize("recurrent_bias", [False, True])
@pytest.mark.parametrize("units", [(4,), (4, 4), (4, 4, 4), (4, 5)])
def test_layers_read_alike_on_a_gpu(monkeypatch, units, recurrent_bias):
  layers, x = made(units, recurrent_bias), normal(1, 12, 2, 3)
  expected = x
  for layer in layers:
    expected = layer(expected)
  np.testing.assert_array_equal(read(layers, x), expected)  # to the last bit
  calls = lambda: (
    "name=stacked_lstm" in str(jax.make_jaxpr(lambda x: read(layers, x))(x))
  )
  assert not calls()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert calls() == (units in ((4, 4), (4, 4, 4)))
  np.testing.assert_allclose(read(layers, x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["char_lstm", "text_lstm"])
def test_models_train_alike_on_a_gpu(monkeypatch, name):
  with jax.enable_x64(False):
    task = MODELS[name]((13,), 5, embedding=3, units=(8, 8))
    variables = task.init(jax.random.key(0))
    x = jax.random.randint(jax.random.key(1), (6, 13), 1, 5)
    examples = {"x": x, "y": x if name == "char_lstm" else x[:, 0]}

    def slopes():
      of = lambda params: task.loss(
        variables._replace(params=params), examples, jax.random.key(2)
      )
      return jax.grad(lambda p: of(p).value.sum())(variables.params)

    expected = slopes()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = slopes()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    got,
    expected,
  )
