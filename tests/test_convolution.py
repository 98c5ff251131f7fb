"""Convolution as matrix products against XLA's own."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_sim.tasks import convolution
from fedjax_sim.tasks.convolution import convolve, patches, winograd
from problems import check_same, normal
from tiers import slow_but

DIMENSIONS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC")}


on_cpu = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="pieces of a CPU's size"
)


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def reference(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=DIMENSIONS[kernel.ndim - 2]
  )


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


def test_one_place_with_strides_off_the_cpu(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  x, kernel = normal(0, 3, 2, 6, 5, 8), normal(1, 3, 1, 1, 8, 3)
  over_lanes = lambda one: jax.vmap(lambda x, k: one(x, k, (2, 2), "SAME"))
  check_same(over_lanes(convolve), over_lanes(reference), x, kernel)
  program = str(jax.make_jaxpr(over_lanes(convolve))(x, kernel))
  assert "optimization_barrier" in program
  monkeypatch.undo()
  program = str(jax.make_jaxpr(over_lanes(convolve))(x, kernel))
  assert "optimization_barrier" not in program


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


@pytest.mark.parametrize(
  "dtype", slow_but([jnp.bfloat16], [jnp.bfloat16, jnp.float16])
)
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


LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


@pytest.mark.parametrize(
  ("inputs", "kernel", "options"),
  [
    ((2, 9, 8, 3), (3, 2, 3, 4), ((1, 2), "SAME", None, (2, 3), LAST)),
    (
      (2, 4, 5, 3),
      (3, 3, 3, 4),
      ((1, 1), ((2, 1), (-1, 2)), (2, 3), None, LAST),
    ),
    ((2, 8, 6, 5), (4, 8, 3, 3), ((1, 1), "SAME", None, None, FIRST)),
    (
      (2, 6, 5, 3),
      (4, 3, 3, 3),
      ((2, 1), "VALID", None, None, ("NHWC", "OIHW", "NCHW")),
    ),
    ((2, 7, 7, 4), (3, 3, 1, 8), ((1, 1), "SAME", None, None, LAST, 4)),
    ((2, 7, 7, 32), (3, 3, 16, 6), ((1, 1), "SAME", None, None, LAST, 2)),
    (
      (2, 5, 4, 3, 2),
      (3, 2, 2, 2, 3),
      ((1, 2, 1), "SAME", None, None, ("NDHWC", "DHWIO", "NDHWC")),
    ),
  ],
  ids=[
    "dilated",
    "transposed",
    "channels first",
    "mixed",
    "depthwise",
    "two groups",
    "volumes",
  ],
)
def test_all_kinds_of_convolution(inputs, kernel, options):
  x, k = normal(0, *inputs), normal(1, *kernel)
  of = lambda x, k: convolve(x, k, *options)
  text = str(jax.make_jaxpr(of)(x, k))
  assert "conv_general_dilated" not in text
  check_same(of, lambda x, k: lax.conv_general_dilated(x, k, *options), x, k)


def test_what_is_left_to_xla():
  left: list[Any] = [
    ((2, 200, 3), (convolution.MOST_PLACES + 1, 3, 4), {}),
    ((4, 9, 3), (2, 3, 4), {"batch_group_count": 2}),
  ]
  for inputs, kernel, options in left:
    x, k = normal(0, *inputs), normal(1, *kernel)
    options |= {"dimension_numbers": DIMENSIONS[1]}
    of = lambda x, k, o=options: convolve(x, k, (1,), "SAME", **o)
    assert "conv_general_dilated" in str(jax.make_jaxpr(of)(x, k))
    expected = lax.conv_general_dilated(x, k, (1,), "SAME", **options)
    np.testing.assert_allclose(of(x, k), expected, atol=1e-12)


def test_the_type_of_sums():
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


def temporaries(function, x, kernel):
  """Bytes that a gradient takes, without what it reads and returns."""
  value = lambda x, k: jnp.sum(function(x, k) ** 2)
  compiled = jax.jit(jax.grad(value, (0, 1))).lower(x, kernel).compile()
  memory: Any = compiled.memory_analysis()
  return memory.temp_size_in_bytes


@on_cpu
@pytest.mark.parametrize(
  ("features", "window", "copies"),
  slow_but([(8, (3, 3), 4)], [(3, (5, 2), 10), (8, (3, 3), 4)]),
  ids=["patches", "winograd"],
)
def test_pieces_of_a_batch(monkeypatch, features, window, copies):
  x, kernel = normal(0, 5, 9, 8, features), normal(1, *window, features, 4)
  example = 9 * 8 * features * copies * x.dtype.itemsize
  monkeypatch.setattr(convolution, "WHOLE_BYTES", 4 * example)
  for examples in (1, 2, 4):  # 5 pieces; 3, the last one filled up; 2
    monkeypatch.setattr(convolution, "PIECE_BYTES", examples * example)
    ours = lambda x, k: convolve(x, k, (1, 1), "SAME")  # JAX remembers others
    text = str(jax.make_jaxpr(ours)(x, kernel))
    assert f"length={math.ceil(5 / examples)}" in text
    check_same(ours, lambda x, k: reference(x, k, (1, 1), "SAME"), x, kernel)
  clients = jnp.stack([kernel, 2 * kernel])
  check_same(
    jax.vmap(ours, (None, 0)),
    jax.vmap(lambda x, k: reference(x, k, (1, 1), "SAME"), (None, 0)),
    x,
    clients,
  )


@on_cpu
def test_kernel_gradients_of_pieces_are_summed_in_single_precision(monkeypatch):
  x = jnp.ones((512, 1, 1), jnp.bfloat16)
  kernel = jnp.ones((1, 1, 1), jnp.bfloat16)
  monkeypatch.setattr(convolution, "WHOLE_BYTES", 2)  # an example of one number
  monkeypatch.setattr(convolution, "PIECE_BYTES", 2)
  of = lambda k: convolve(x, k, (1,), "VALID").astype(jnp.float32).sum()
  # One by one in bfloat16 a sum of ones ends at 256.
  gradient = jax.grad(of)(kernel)
  assert gradient.dtype == kernel.dtype
  assert float(gradient[0, 0, 0]) == 512


@on_cpu
def test_temporaries_are_bounded():
  x = jax.ShapeDtypeStruct((16, 32, 32, 32), jnp.float32)
  kernel = jax.ShapeDtypeStruct((7, 7, 32, 32), jnp.float32)
  ours = temporaries(lambda x, k: convolve(x, k, (1, 1), "SAME"), x, kernel)
  assert ours < 50e6  # 16 * 32**3 * 49 float32 are 103e6, twice


def test_an_example_that_is_too_large_is_left_to_xla(monkeypatch):
  x, kernel = normal(0, 2, 6, 6, 3), normal(1, 3, 3, 3, 4)
  size = 6 * 6 * 9 * 3 * 8
  for most, left in ((size, False), (size - 1, True)):
    monkeypatch.setattr(convolution, "MOST_BYTES", most)
    of = lambda x, k: convolve(x, k, (1, 1), "SAME")  # JAX remembers others
    text = str(jax.make_jaxpr(of)(x, kernel))
    assert ("conv_general_dilated" in text) == left
    check_same(of, lambda x, k: reference(x, k, (1, 1), "SAME"), x, kernel)
