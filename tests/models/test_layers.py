"""Layers against flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fedjax_sim.models.layers import (
  GRU,
  LSTM,
  conv,
  gru,
  lstm,
  lstm_and_cell,
  max_pool,
)
from problems import check_same, normal


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize(
  "options",
  [
    {"strides": 2},
    {"strides": 2, "padding": 1},
    {"padding": "VALID"},
    {"use_bias": False},
  ],
)
def test_a_layer_is_nnx_conv(options):
  ours = conv(8, 4, (3, 3), rngs=nnx.Rngs(0), **options)
  theirs = nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0), **options)
  x = normal(0, 2, 7, 9, 8)
  np.testing.assert_allclose(ours(x), theirs(x), atol=1e-12)


@pytest.mark.parametrize(
  "shape",
  [(2, 6, 8, 3), (2, 7, 5, 3), (2, 9, 3), (2, 1, 4, 3), (2, 0, 3), (0, 4, 3)],
)
def test_pooling(shape):
  x = normal(0, *shape)
  window = (2,) * (len(shape) - 2)
  check_same(max_pool, lambda x: nnx.max_pool(x, window, strides=window), x)


@pytest.mark.parametrize("shape", [(2, 6, 9, 3), (2, 7, 3), (2, 1, 2, 3)])
def test_pooling_with_overlap_and_padding(shape):
  x = normal(0, *shape)
  space = len(shape) - 2
  check_same(
    lambda x: max_pool(x, 3, strides=2, padding=1),
    lambda x: nnx.max_pool(
      x, (3,) * space, strides=(2,) * space, padding=[(1, 1)] * space
    ),
    x,
  )


# --- recurrence ---------------------------------------------------------------


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
  """The forms for a CPU and for a GPU, both computed here."""
  monkeypatch.setattr(jax, "default_backend", lambda: request.param)


def plain_lstm(gates, kernel):
  return plain_lstm_and_cell(gates, kernel)[0]


def plain_lstm_and_cell(gates, kernel):
  def step(state, z):
    h, c = state
    i, f, g, o = jnp.split(z + h @ kernel, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  zero = jnp.zeros((gates.shape[1], kernel.shape[0]))
  (_, end), outputs = lax.scan(step, (zero, zero), gates)
  return outputs, end


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("time", "batch"), [(1, 1), (2, 3), (13, 2)])
def test_lstm_is_the_plain_recurrence(time, batch):
  check_same(lstm, plain_lstm, normal(0, time, batch, 20), normal(1, 5, 20))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("time", "batch"), [(1, 1), (13, 2)])
def test_the_last_cell_has_a_gradient(time, batch):
  pair = lambda function: (
    lambda z, k: jnp.concatenate([x.ravel() for x in function(z, k)])
  )
  check_same(
    pair(lstm_and_cell),
    pair(plain_lstm_and_cell),
    normal(0, time, batch, 20),
    normal(1, 5, 20),
  )


@pytest.mark.usefixtures("backend")
def test_an_lstm_for_each_client():
  check_same(
    jax.vmap(lstm),
    jax.vmap(plain_lstm),
    normal(0, 3, 6, 2, 20),
    normal(1, 3, 5, 20),
  )


def test_steps_share_an_iteration_of_the_loop_on_a_gpu(monkeypatch):
  arrays = normal(0, 16, 2, 20), normal(1, 5, 20)
  lengths = lambda: [
    equation.params["length"] // equation.params["unroll"]
    for equation in jax.make_jaxpr(jax.vjp(lstm, *arrays)[1])(
      normal(2, 16, 2, 5)
    ).eqns
    if equation.primitive.name == "scan"
  ]
  assert lengths() == [16]
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert lengths() == [2]


def test_gates_of_fewer_digits_than_the_kernel():
  gates, kernel = normal(0, 6, 2, 20) / 2, normal(1, 5, 20) / 2
  low, single = gates.astype(jnp.bfloat16), kernel.astype(jnp.float32)
  grad = jax.grad(lambda z, k: lstm(z, k).astype(float).sum(), (0, 1))
  exact = jax.grad(lambda z, k: plain_lstm(z, k).sum(), (0, 1))
  assert lstm(low, single).dtype == jnp.bfloat16
  for one, other, dtype in zip(
    grad(low, single),
    exact(gates, kernel),
    (jnp.bfloat16, jnp.float32),
    strict=True,
  ):
    assert one.dtype == dtype
    error = jnp.abs(one.astype(float) - other).max() / jnp.abs(other).max()
    assert float(error) < 0.03


def test_the_layer_is_flaxs_cell():
  with jax.enable_x64(False):
    layer = LSTM(3, 5, rngs=nnx.Rngs(0))
    cell = nnx.OptimizedLSTMCell(3, 5, rngs=nnx.Rngs(1))
    cell.dense_i.kernel[...] = layer.inputs.kernel[...]
    cell.dense_h.kernel[...] = layer.recurrent[...]
    bias = nnx.Param(normal(4, 20).astype(jnp.float32))
    cell.dense_h.bias = layer.inputs.bias = bias
    x = normal(0, 7, 2, 3).astype(jnp.float32)
    expected = nnx.RNN(cell, time_major=True)(x)
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)
    other = LSTM(3, 5, recurrent_bias=True, rngs=nnx.Rngs(0))
    half = nnx.Param(bias[...] / 2)
    other.inputs.bias = other.recurrent_bias = half
    np.testing.assert_allclose(other(x), expected, atol=1e-6)


def plain_gru(gates, kernel, bias):
  units = len(bias)

  def step(h, given):
    by_state = h @ kernel
    opened = jax.nn.sigmoid(given[:, : 2 * units] + by_state[:, : 2 * units])
    r, z = jnp.split(opened, 2, axis=-1)
    inner = by_state[:, 2 * units :] + bias[None]
    n = jnp.tanh(given[:, 2 * units :] + r * inner)
    h = (1 - z) * n + z * h
    return h, h

  return lax.scan(step, jnp.zeros((gates.shape[1], units)), gates)[1]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("time", "batch"), [(1, 1), (13, 2)])
def test_gru_is_the_plain_recurrence(time, batch):
  arrays = normal(0, time, batch, 15), normal(1, 5, 15), normal(2, 5)
  check_same(gru, plain_gru, *arrays)


@pytest.mark.usefixtures("backend")
def test_a_gru_for_each_client():
  arrays = normal(0, 3, 6, 2, 15), normal(1, 3, 5, 15), normal(2, 3, 5)
  check_same(jax.vmap(gru), jax.vmap(plain_gru), *arrays)


def test_a_gru_of_fewer_digits_than_its_kernel():
  gates, kernel, bias = normal(0, 6, 2, 15), normal(1, 5, 15) / 2, normal(2, 5)
  low, single = gates.astype(jnp.bfloat16), kernel.astype(jnp.float32)
  assert gru(low, single, bias).dtype == jnp.bfloat16
  grad = jax.grad(lambda *a: gru(*a).astype(float).sum(), (0, 1, 2))
  exact = jax.grad(lambda *a: plain_gru(*a).sum(), (0, 1, 2))
  for one, given, other in zip(
    grad(low, single, bias),
    (low, single, bias),
    exact(gates, kernel, bias),
    strict=True,
  ):
    assert one.dtype == given.dtype
    error = jnp.abs(one.astype(float) - other).max() / jnp.abs(other).max()
    assert float(error) < 0.05


def test_the_gru_layer_is_pytorchs_cell():
  """Against the equations of torch.nn.GRU, step by step in numpy."""
  with jax.enable_x64(False):
    layer = GRU(3, 5, rngs=nnx.Rngs(0))
    x = normal(0, 7, 2, 3).astype(jnp.float32)
    found = layer(x)
  assert layer.inputs.bias is not None
  both = layer.inputs.kernel[...], layer.inputs.bias[...]
  inputs, bias_in = (np.asarray(v, np.float64) for v in both)
  both = layer.recurrent[...], layer.recurrent_bias[...]
  kernel, bias = (np.asarray(v, np.float64) for v in both)
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  h, states = np.zeros((2, 5)), []
  for step in np.asarray(x, np.float64):
    by_input = np.split(step @ inputs + bias_in, 3, axis=1)
    by_state = np.split(h @ kernel + bias, 3, axis=1)
    r, z = (sigmoid(by_input[i] + by_state[i]) for i in (0, 1))
    n = np.tanh(by_input[2] + r * by_state[2])
    h = (1 - z) * n + z * h
    states.append(h)
  np.testing.assert_allclose(found, states, atol=1e-6)
  drawn = [abs(v).max() for v in (inputs, bias_in, kernel, bias)]
  assert max(drawn) <= 5**-0.5 < 1.2 * max(drawn)
