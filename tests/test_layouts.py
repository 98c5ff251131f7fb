"""Narrow kernels lie column by column while clients train, and only there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core.tree import all_finite, is_narrow
from fedjax_sim.engine.layouts import by_columns
from fedjax_sim.models.logistic_regression import logistic_regression
from problems import blobs, make_simulator, sgd

FEATURES, CLASSES = 24, 3


@pytest.mark.parametrize(
  ("shape", "dtype", "narrow"),
  [
    ((784, 10), jnp.float32, True),
    ((64, 32), jnp.float32, True),
    ((63, 32), jnp.float32, False),
    ((784, 33), jnp.float32, False),
    ((10, 784), jnp.float32, False),
    ((784, 10), jnp.bfloat16, False),
    ((784,), jnp.float32, False),
    ((3, 784, 10), jnp.float32, False),
  ],
)
def test_narrow(shape, dtype, narrow):
  x = jax.ShapeDtypeStruct(shape, dtype)
  assert is_narrow(x) is narrow


def test_laying_out_changes_nothing_else():
  tree = {
    "kernel": np.arange(120, dtype=np.float32).reshape(40, 3),
    "bias": np.arange(3, dtype=np.float32),
    "key": jax.random.key(0),
    "none": None,
    "number": 2.5,
  }
  for function in (by_columns, jax.jit(by_columns)):
    out = function(tree)
    np.testing.assert_array_equal(out["kernel"], tree["kernel"])
    np.testing.assert_array_equal(out["bias"], tree["bias"])
    assert out["key"] == tree["key"]
    assert out["number"] == 2.5
  assert by_columns(tree)["kernel"] is tree["kernel"]


def test_derivatives_and_lanes_pass():
  kernels = np.arange(240, dtype=np.float32).reshape(2, 40, 3)
  square = lambda x: jnp.sum(by_columns({"k": x})["k"] ** 2)
  gradient = jax.jit(jax.vmap(jax.grad(square)))(kernels)
  np.testing.assert_array_equal(gradient, 2 * kernels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_anywhere_in_a_narrow_matrix(value):
  x = np.zeros((40, 3), np.float32)
  assert all_finite(x)
  for row, column in [(0, 0), (39, 2), (17, 1)]:
    bad = x.copy()
    bad[row, column] = value
    assert not all_finite(bad)


def test_kernels_lie_by_columns_in_the_loops_over_waves_and_steps():
  task = logistic_regression((FEATURES,), CLASSES)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    blobs([9, 5, 7], FEATURES, CLASSES),
  )
  simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  (program,) = simulator.compiler.compiled.values()
  loops = re.findall(r" = \((.*)\) while\(", program.compiled.as_text())
  kernel = re.escape(f"f32[{FEATURES},{CLASSES}]") + r"\{([\d,]+)\}"
  layouts = [x for loop in loops for x in set(re.findall(kernel, loop))]
  assert sorted(layouts) == ["0,1", "0,1", "1,0"]  # that over rounds by rows
