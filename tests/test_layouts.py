"""Narrow kernels lie column by column while clients train, and only there."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Pass
from fedjax_sim.core.tree import all_finite, is_narrow
from fedjax_sim.engine.layouts import (
  ByColumns,
  by_columns,
  by_rows,
  trained_by_columns,
)
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


def test_laying_out_changes_no_number():
  tree = {
    "kernel": np.arange(120, dtype=np.float32).reshape(40, 3),
    "bias": np.arange(3, dtype=np.float32),
    "wide": np.ones((3, 40), np.float32),  # as a kernel by columns has it
    "key": jax.random.key(0),
    "none": None,
    "number": 2.5,
  }
  turned = by_columns(tree)
  assert isinstance(turned["kernel"], ByColumns)
  assert turned["kernel"].columns.shape == (3, 40)
  assert {k: v for k, v in turned.items() if k != "kernel"} == {
    k: v for k, v in tree.items() if k != "kernel"
  }
  for pinned in (False, True):
    back = jax.jit(lambda tree, p=pinned: by_rows(by_columns(tree, p)))(tree)
    assert back.keys() == tree.keys()
    np.testing.assert_array_equal(back["kernel"], tree["kernel"])
    np.testing.assert_array_equal(back["wide"], tree["wide"])


def test_tables_keep_their_shape():
  table = np.arange(120, dtype=np.float32).reshape(12, 10)
  table = np.concatenate([table, table])
  tree = {"layers": {"embedding": {"value": table}, "kernel": table}}
  for function in (by_columns, jax.jit(by_columns)):
    turned = function(tree)["layers"]
    np.testing.assert_array_equal(turned["embedding"]["value"], table)
    np.testing.assert_array_equal(turned["kernel"].columns, table.T)


@pytest.mark.parametrize("pinned", [False, True])
def test_derivatives_and_lanes_pass(pinned):
  kernels = np.arange(240, dtype=np.float32).reshape(2, 40, 3)
  square = lambda x: jnp.sum(by_rows(by_columns({"k": x}, pinned))["k"] ** 2)
  gradient = jax.jit(jax.vmap(jax.grad(square)))(kernels)
  np.testing.assert_array_equal(gradient, 2 * kernels)
  _, slope = jax.jvp(jax.jit(square), (kernels[0],), (kernels[0],))
  np.testing.assert_allclose(slope, 2 * np.sum(kernels[0] ** 2), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_anywhere_in_a_narrow_matrix(value):
  x = np.zeros((40, 3), np.float32)
  assert all_finite(x)
  for row, column in [(0, 0), (39, 2), (17, 1)]:
    bad = x.copy()
    bad[row, column] = value
    assert not all_finite(bad)


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (lambda x: x[1:], r"float32 of shape \(39, 3\); keep"),
    (lambda x: x.astype(jnp.bfloat16), r"bfloat16 of shape \(40, 3\); keep"),
  ],
)
def test_a_step_that_changes_a_kernel_is_told_of_it_by_rows(change, told):
  kernel = np.ones((40, 3), np.float32)
  walk = Pass(
    lambda client: {"kernel": kernel},
    lambda client, carry, batch, key: jax.tree.map(change, carry),
  )
  plain = fedavg(logistic_regression((40,), 3), sgd(0.1), sgd(1.0))
  (walk,) = trained_by_columns(plain._replace(passes=(walk,)), False).passes
  nothing: Any = None
  carry = walk.start(nothing)
  was = r"\['kernel'\] was an array, float32 of shape \(40, 3\)"
  with pytest.raises(TypeError, match=f"{was}, and .* {told}"):
    walk.step(nothing, carry, nothing, nothing)


@pytest.mark.parametrize("lanes", [1, 2])
def test_kernels_lie_by_columns_in_the_loops_over_waves_and_steps(lanes):
  task = logistic_regression((FEATURES,), CLASSES)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    blobs([9, 5, 7], FEATURES, CLASSES),
    lanes=lanes,
  )
  simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  (program,) = simulator.compiler.compiled.values()
  loops = re.findall(r" = \((.*)\) while\(", program.compiled.as_text())
  kernels = re.compile(
    rf"f32\[(?:{lanes},)?({FEATURES},{CLASSES}|{CLASSES},{FEATURES})\]"
    r"\{(?:2,)?([\d,]+)\}"
  )
  found = [set(kernels.findall(loop)) for loop in loops]
  columns = {(f"{CLASSES},{FEATURES}", "1,0")}
  rows = {(f"{FEATURES},{CLASSES}", "1,0")}
  assert found.count(columns) == 2
  assert (
    found.count(rows | columns) + found.count(rows) == 1
  )  # that over rounds
