"""Pooling by slices against XLA's own windows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_sim.tasks import pooling
from problems import check_same, normal
from tiers import slow_but


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


# What computes it here, XLA's operation, and what padding holds.
KINDS = {
  "maximum": (pooling.maximum, lax.max, -np.inf),
  "minimum": (pooling.minimum, lax.min, np.inf),
  "total": (pooling.total, lax.add, 0.0),
}
NONE = ((0, 0), (0, 0))
WINDOWS = {  # window, strides, padding, dilation
  "apart": ((1, 2, 2, 1), (1, 2, 2, 1), (*NONE, *NONE), (1, 1, 1, 1)),
  "overlapping": (
    (1, 3, 3, 1),
    (1, 2, 1, 1),
    ((0, 0), (1, 1), (0, 2), (0, 0)),
    (1, 1, 1, 1),
  ),
  "dilated": ((1, 2, 3, 1), (1, 1, 2, 1), (*NONE, *NONE), (1, 3, 2, 1)),
  "everything": ((2, 7, 8, 1), (1, 1, 1, 1), (*NONE, *NONE), (1, 1, 1, 1)),
  "too large": ((1, 9, 2, 1), (1, 1, 1, 1), (*NONE, *NONE), (1, 1, 1, 1)),
}


@pytest.mark.parametrize(
  ("kind", "windows", "values"),
  slow_but(
    [
      *(("maximum", windows, "normal") for windows in WINDOWS),
      *((kind, "everything", "equal") for kind in KINDS),
    ],
    itertools.product(KINDS, WINDOWS, ["normal", "equal"]),
  ),
)
def test_windows_are_xlas(kind, windows, values):
  ours, operation, fill = KINDS[kind]
  window, strides, padding, dilation = WINDOWS[windows]
  x = normal(0, 2, 7, 8, 3)
  if values == "equal":  # many maxima are: whose is the gradient?
    x = jnp.round(x)

  def theirs(x):
    return lax.reduce_window(
      x, fill, operation, window, strides, padding, window_dilation=dilation
    )

  of = lambda x: ours(x, window, strides, padding, dilation)
  if windows == "dilated" and kind != "total":  # XLA has no gradient
    np.testing.assert_array_equal(jax.jit(of)(x), theirs(x))
  else:
    check_same(of, theirs, x)


@pytest.mark.parametrize("kind", ["maximum", "minimum"])
def test_infinities_and_nan(kind):
  ours, operation, fill = KINDS[kind]
  x = jnp.asarray([1.0, jnp.nan, -jnp.inf, 3.0, jnp.inf, -2.0, jnp.nan, 0.0])
  found = jax.jit(lambda x: ours(x, (2,), (1,)))(x)
  expected = lax.reduce_window(x, fill, operation, (2,), (1,), "VALID")
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.float16])
def test_other_dtypes(dtype):
  x = jnp.asarray([[3, 1, 200, 250], [2, 7, 7, 0]], dtype)
  found = jax.jit(lambda x: pooling.maximum(x, (1, 2), (1, 2)))(x)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, [[3, 250], [7, 7]])
  padded = pooling.minimum(x, (1, 2), (1, 2), ((0, 0), (1, 1)))
  np.testing.assert_array_equal(padded, [[3, 1, 250], [2, 7, 0]])


def test_sums_of_half_precision_are_taken_in_single():
  x = jnp.full((300,), 1.0, jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
  assert float(pooling.total(x, (300,), (1,))[0]) == 300
