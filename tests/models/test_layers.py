"""Convolution, pooling and recurrence against XLA's and flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fedjax_sim.models.layers import (
  LSTM,
  conv,
  convolve,
  lstm,
  max_pool,
  patches,
  winograd,
)

DIMENSIONS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC")}


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def reference(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=DIMENSIONS[kernel.ndim - 2]
  )


def check_same(one, other, *arguments, tolerance=1e-12):
  """Both functions' values, and their gradients of a sum of sines."""

  def of(function):
    def value(*a):
      out = function(*a)
      return jnp.sum(jnp.sin(out)), out

    numbers = tuple(range(len(arguments)))
    return jax.jit(jax.grad(value, numbers, has_aux=True))(*arguments)

  for a, b in zip(*map(jax.tree.leaves, (of(one), of(other))), strict=True):
    assert a.shape == b.shape
    atol = tolerance * (1 + abs(b).max(initial=0))
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(
  ("shape", "window", "strides", "padding"),
  [
    ((9, 7, 3), (3, 2), 1, "SAME"),
    ((9, 7, 1), (4, 4), 2, "VALID"),
    ((5, 8, 2), (1, 3), 3, ((1, 2), (0, 1))),
    ((6, 6, 8), (3, 3), 1, ((0, 1), (2, 0))),
    ((6, 5, 8), (1, 1), 2, "SAME"),
  ],
)
def test_convolution_is_xlas(shape, window, strides, padding):
  x, kernel = normal(0, 2, *shape), normal(1, *window, shape[-1], 3)
  check_same(
    lambda x, k: convolve(x, k, (strides, strides), padding),
    lambda x, k: reference(x, k, (strides, strides), padding),
    x,
    kernel,
  )


@pytest.mark.parametrize("method", [patches, winograd])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 10), (3, 3)])
def test_gradients_of_convolution(method, h, w):
  x, kernel = normal(0, 3, h, w, 8), normal(1, 3, 3, 8, 5)
  check_same(
    lambda x, k: method(x, k, (1, 1)),
    lambda x, k: reference(x, k, (1, 1), "VALID"),
    x,
    kernel,
  )


@pytest.mark.parametrize("features", [2, 8])
def test_a_kernel_for_each_client(features):
  x = normal(0, 3, 2, 6, 6, features)
  kernels = normal(1, 3, 3, 3, features, 4)
  ours = lambda x, k: convolve(x, k, (1, 1), "SAME")
  theirs = lambda x, k: reference(x, k, (1, 1), "SAME")
  check_same(jax.vmap(ours), jax.vmap(theirs), x, kernels)


def test_one_dimension():
  x, kernel = normal(0, 2, 11, 3), normal(1, 5, 3, 4)
  check_same(
    lambda x, k: convolve(x, k, (2,), "SAME"),
    lambda x, k: reference(x, k, (2,), "SAME"),
    x,
    kernel,
  )


def test_single_precision_loses_little():
  x, kernel = normal(0, 4, 24, 24, 64), normal(1, 3, 3, 64, 64) / 24
  exact = reference(x, kernel, (1, 1), "SAME")
  single = jnp.float32
  out = jax.jit(convolve, static_argnums=(2, 3))(
    x.astype(single), kernel.astype(single), (1, 1), "SAME"
  )
  assert out.dtype == single
  assert float(jnp.abs(out - exact).max()) < 1e-5 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_its_digits(dtype):
  x, kernel = normal(0, 4, 12, 12, 64), normal(1, 3, 3, 64, 16)
  weight = normal(2, 4, 12, 12, 16)
  low = x.astype(dtype), kernel.astype(dtype)
  exact = low[0].astype(jnp.float32), low[1].astype(jnp.float32)

  def of(function, arguments):
    def value(*a):
      out = function(*a, (1, 1), "SAME")
      return jnp.sum(out * weight), out

    grads, out = jax.grad(value, (0, 1), has_aux=True)(*arguments)
    return out, *grads

  digit = float(jnp.finfo(dtype).eps) / 2
  # An input's gradient is a sum of 9 rounded ones.
  bounds = (digit, 3 * digit, digit)
  for a, b, bound in zip(
    of(convolve, low), of(reference, exact), bounds, strict=True
  ):
    assert a.dtype == dtype
    error = jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()
    assert float(error) < bound


def test_whole_numbers():
  x = jnp.arange(2 * 5 * 5 * 8).reshape(2, 5, 5, 8) % 7
  kernel = jnp.arange(3 * 3 * 8 * 2).reshape(3, 3, 8, 2) % 5
  out = convolve(x, kernel, (1, 1), "SAME")
  assert out.dtype == x.dtype
  np.testing.assert_array_equal(out, reference(x, kernel, (1, 1), "SAME"))


@pytest.mark.parametrize("method", [patches, winograd])
@pytest.mark.parametrize(
  "shape", [(0, 6, 6, 8), (2, 2, 2, 8), (2, 1, 5, 8), (1, 5, 0, 8)]
)
def test_no_outputs(method, shape):
  x, kernel = normal(0, *shape), normal(1, 3, 3, 8, 4)
  check_same(
    lambda x, k: method(x, k, (1, 1)),
    lambda x, k: reference(x, k, (1, 1), "VALID"),
    x,
    kernel,
  )


@pytest.mark.parametrize("shape", [(0, 6, 6, 2), (2, 2, 2, 2), (2, 1, 5, 2)])
def test_no_outputs_of_strides(shape):
  x, kernel = normal(0, *shape), normal(1, 3, 3, 2, 4)
  check_same(
    lambda x, k: convolve(x, k, (2, 2), "VALID"),
    lambda x, k: reference(x, k, (2, 2), "VALID"),
    x,
    kernel,
  )


@pytest.mark.parametrize(
  "options", [{"strides": 2}, {"padding": "VALID"}, {"use_bias": False}]
)
def test_a_layer_is_nnx_conv(options):
  ours = conv(8, 4, (3, 3), rngs=nnx.Rngs(0), **options)
  theirs = nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0), **options)
  x = normal(0, 2, 7, 9, 8)
  np.testing.assert_allclose(ours(x), theirs(x), atol=1e-12)


def test_what_is_left_to_xla():
  x, kernel = normal(0, 2, 9, 9, 4), normal(1, 3, 3, 2, 4)
  layer = nnx.Conv(
    4,
    4,
    (3, 3),
    feature_group_count=2,
    kernel_dilation=2,
    conv_general_dilated=convolve,
    rngs=nnx.Rngs(0),
  )
  layer.kernel[...] = kernel.astype(jnp.float32)
  theirs = nnx.Conv(
    4, 4, (3, 3), feature_group_count=2, kernel_dilation=2, rngs=nnx.Rngs(0)
  )
  theirs.kernel[...] = kernel.astype(jnp.float32)
  np.testing.assert_allclose(layer(x), theirs(x), atol=1e-12)


def test_channels_first_are_left_to_xla():
  x, kernel = normal(0, 2, 8, 6, 5), normal(1, 4, 8, 3, 3)
  options = ((1, 1), "SAME", None, None, ("NCHW", "OIHW", "NCHW"))
  check_same(
    lambda x, k: convolve(x, k, *options),
    lambda x, k: lax.conv_general_dilated(x, k, *options),
    x,
    kernel,
  )
  # Left to XLA for another reason, channels are last as well.
  x, kernel = normal(0, 2, 8, 6, 3), normal(1, 3, 3, 3, 4)
  dilated = ((1, 1), "SAME", None, (2, 2))
  check_same(
    lambda x, k: convolve(x, k, *dilated),
    lambda x, k: lax.conv_general_dilated(
      x, k, *dilated, dimension_numbers=DIMENSIONS[2]
    ),
    x,
    kernel,
  )


def test_the_type_of_sums_is_left_to_xla():
  x, kernel = normal(0, 2, 6, 6, 8), normal(1, 3, 3, 8, 4)
  x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  out = convolve(x, kernel, (1, 1), "SAME", preferred_element_type=jnp.float32)
  assert out.dtype == jnp.float32
  exact = reference(
    x.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1), "SAME"
  )
  np.testing.assert_allclose(out, exact, atol=1e-4)


def test_the_sharding_of_outputs_is_left_to_xla(monkeypatch):
  given = {}
  monkeypatch.setattr(
    lax, "conv_general_dilated", lambda *_, **options: given.update(options)
  )
  x, kernel = normal(0, 2, 6, 6, 8), normal(1, 3, 3, 8, 4)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  convolve(x, kernel, (1, 1), "SAME", out_sharding=where)
  assert given["out_sharding"] is where


@pytest.mark.parametrize(
  "shape",
  [(2, 6, 8, 3), (2, 7, 5, 3), (2, 9, 3), (2, 1, 4, 3), (2, 0, 3), (0, 4, 3)],
)
def test_pooling(shape):
  x = normal(0, *shape)
  window = (2,) * (len(shape) - 2)
  check_same(max_pool, lambda x: nnx.max_pool(x, window, strides=window), x)


def test_equal_maxima_share_a_gradient():
  x = jnp.asarray([[1.0, 1, 5, 2], [1, 1, 3, 5]])[None, :, :, None]
  shares = jax.grad(lambda x: max_pool(x).sum())(x)[0, :, :, 0]
  expected = [[0.25, 0.25, 0.5, 0], [0.25, 0.25, 0, 0.5]]
  np.testing.assert_array_equal(shares, expected)


# --- recurrence ---------------------------------------------------------------


def plain_lstm(gates, kernel):
  def step(state, z):
    h, c = state
    i, f, g, o = jnp.split(z + h @ kernel, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  zero = jnp.zeros((gates.shape[1], kernel.shape[0]))
  return lax.scan(step, (zero, zero), gates)[1]


@pytest.mark.parametrize(("time", "batch"), [(1, 1), (2, 3), (13, 2)])
def test_lstm_is_the_plain_recurrence(time, batch):
  check_same(lstm, plain_lstm, normal(0, time, batch, 20), normal(1, 5, 20))


def test_an_lstm_for_each_client():
  check_same(
    jax.vmap(lstm),
    jax.vmap(plain_lstm),
    normal(0, 3, 6, 2, 20),
    normal(1, 3, 5, 20),
  )


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
