"""Dense layers with few outputs, against numpy, and where they are used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_sim.tasks.dense import dense
from fedjax_sim.tasks.fast_layers import fast

ROWS, INPUTS, OUTPUTS = 7, 60, 5


def arrays(*batch):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((*batch, INPUTS), dtype=np.float32)
  kernel = rng.standard_normal((INPUTS, OUTPUTS), dtype=np.float32)
  return jnp.asarray(x), jnp.asarray(kernel)


def shapes_of_gradients(function, *arguments):
  """Return the shapes of all products in the gradient by the last argument."""
  gradient = jax.grad(function, len(arguments) - 1)
  program = jax.make_jaxpr(gradient)(*arguments)

  def products(part):
    for equation in part.eqns:
      if equation.primitive is lax.dot_general_p:
        yield equation.outvars[0].aval.shape
      for inner in equation.params.values():
        if isinstance(inner, jax.extend.core.ClosedJaxpr):
          yield from products(inner.jaxpr)

  return list(products(program.jaxpr))


@pytest.mark.parametrize("batch", [(ROWS,), (2, ROWS), ()])
def test_values_and_gradients_are_those_of_the_product(batch):
  x, kernel = arrays(*batch)
  weights = np.random.default_rng(1).standard_normal((*batch, OUTPUTS))

  def weighted(x, kernel):
    return jnp.sum(dense(x, kernel) * weights.astype(np.float32))

  exact_x, exact_kernel = (np.asarray(a, np.float64) for a in (x, kernel))
  value, (by_x, by_kernel) = jax.value_and_grad(weighted, (0, 1))(x, kernel)
  expected = exact_x @ exact_kernel
  np.testing.assert_allclose(dense(x, kernel), expected, 1e-5, 1e-5)
  np.testing.assert_allclose(value, np.sum(expected * weights), 1e-5, 1e-5)
  np.testing.assert_allclose(by_x, weights @ exact_kernel.T, 1e-5, 1e-5)
  np.testing.assert_allclose(
    by_kernel,
    exact_x.reshape(-1, INPUTS).T @ weights.reshape(-1, OUTPUTS),
    *(1e-5, 1e-5),
  )


def test_it_has_a_forward_derivative_and_a_second_one():
  x, kernel = arrays(ROWS)
  loss = lambda product: lambda k: jnp.sum(jnp.tanh(product(x, k)))
  plain, narrow = loss(jnp.matmul), loss(dense)
  for derived in (
    lambda f: jax.jvp(f, (kernel,), (kernel,))[1],
    lambda f: jax.jvp(jax.grad(f), (kernel,), (kernel,))[1],
    lambda f: jax.grad(lambda k: jnp.sum(jax.grad(f)(k) ** 2))(kernel),
  ):
    np.testing.assert_allclose(derived(narrow), derived(plain), 1e-4, 1e-4)


def test_lanes_have_kernels_of_their_own():
  x, kernel = arrays(3, ROWS)
  kernels = jnp.stack([kernel, 2 * kernel, -kernel])
  np.testing.assert_allclose(
    jax.vmap(dense)(x, kernels), x @ kernels, 1e-5, 1e-5
  )


def test_precisions_go_with_their_arrays():
  x, kernel = arrays(ROWS)
  both = lax.Precision.HIGHEST, lax.Precision.DEFAULT
  program = jax.make_jaxpr(functools.partial(dense, precision=both))(x, kernel)
  (product,) = (e for e in program.eqns if e.primitive is lax.dot_general_p)
  assert product.params["precision"] == both[::-1]


def test_gradients_of_narrow_kernels_have_long_rows():
  x, kernel = arrays(ROWS)
  loss = lambda x, kernel: jnp.sum(jnp.tanh(x @ kernel))
  plain = shapes_of_gradients(loss, x, kernel)
  assert plain == [(ROWS, OUTPUTS), (OUTPUTS, INPUTS)]  # then transposed
  narrow = shapes_of_gradients(fast(loss), x, kernel)
  assert narrow == [(OUTPUTS, ROWS), (OUTPUTS, INPUTS)]


@pytest.mark.parametrize(
  ("x", "kernel", "product"),
  [
    ((ROWS, 60), (60, 33), jnp.matmul),  # as fast by rows
    ((ROWS, 9), (9, 5), jnp.matmul),  # nearly square
    ((3, ROWS, 60), (3, 60, 5), jnp.matmul),  # a kernel for each
    ((ROWS, 5), (60, 5), lambda x, k: x @ k.T),
  ],
)
def test_other_products_stay(x, kernel, product):
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, kernel)]
  assert str(jax.make_jaxpr(fast(product))(*shapes)) == str(
    jax.make_jaxpr(product)(*shapes)
  )


def test_an_algorithm_of_ones_own_stays():
  single = np.dtype(np.float32)
  algorithm = lax.DotAlgorithm(single, single, single)
  product = functools.partial(jnp.matmul, precision=algorithm)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(ROWS)]
  assert str(jax.make_jaxpr(fast(product))(*shapes)) == str(
    jax.make_jaxpr(product)(*shapes)
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64, jnp.int32])
def test_other_dtypes_stay(dtype):
  with jax.enable_x64(True):
    x, kernel = (jnp.ones(s, dtype) for s in ((ROWS, 60), (60, 5)))
    product = lambda x, k: x @ k
    program = jax.make_jaxpr(fast(product))(x, kernel)
    assert str(program) == str(jax.make_jaxpr(product)(x, kernel))
