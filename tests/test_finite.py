"""Finite or not, of every dtype, against numpy; one tree or another."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedjax_sim.core.tree import all_finite, no_nan, tree_where

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


def bits(dtype):
  """Numbers of any bits: subnormal, huge, infinite, every NaN."""
  ints = np.dtype(f"u{np.dtype(dtype).itemsize}")
  return arrays.arrays(ints, st.sampled_from([0, 1, 33])).map(
    lambda x: x.view(dtype)
  )


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
def test_any_bits(dtype, data):
  x = data.draw(bits(dtype))
  with np.errstate(invalid="ignore"):  # the cast of a signalling NaN
    wide = x.astype(np.float64)
  assert all_finite({"x": x}) == np.isfinite(wide).all()
  assert no_nan({"x": x}) == (not np.isnan(wide).any())


@pytest.mark.parametrize("dtype", [*FLOATS, np.complex64])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_one_bad_number_among_many(dtype, bad):
  x = np.full((7, 13), np.finfo(np.float16).max).astype(dtype)
  tree = {"good": jnp.ones(3), "x": jnp.asarray(x)}
  assert all_finite(tree)
  x[5, 11] = bad
  assert not all_finite(tree | {"x": jnp.asarray(x)})


@pytest.mark.parametrize("dtype", FLOATS)
def test_none_is_lost_where_parts_are_summed(dtype):
  """Lengths that are divided several times, once, and not at all."""
  finite = jax.jit(all_finite)
  for length in (2**16, 7840, 251, 33, 32):
    x = np.zeros(length, dtype)
    assert finite(x)
    for bad in (0, length // 2, length - 1, slice(None)):
      broken = x.copy()
      broken[bad] = np.inf
      assert not finite(broken)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(dtype):
  most = jnp.finfo(dtype).max
  assert all_finite([jnp.array([most, -most, 0, -0.0])])


def test_whole_numbers_and_nothing_are_finite():
  assert all_finite({"n": jnp.array([2**31 - 1, -(2**31)]), "none": ()})
  assert all_finite(jnp.zeros((0, 3)))


def test_a_choice_of_the_same_array_is_that_array():
  kept, one, two = jnp.ones(2), jnp.zeros(2), jnp.full(2, 3.0)
  chosen = tree_where(jnp.array(False), (kept, one), (kept, two))
  assert chosen[0] is kept
  np.testing.assert_array_equal(chosen[1], two)
