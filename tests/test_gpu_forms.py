"""What is computed in another form on a GPU is the same, computed here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.loops import repeat
from fedjax_sim.models.layers import conv, max_pool
from fedjax_sim.tasks.convolution import FEW_FEATURES, convolve
from fedjax_sim.tasks.losses import negative_log_likelihood
from problems import (
  MODELS,
  blobs,
  check_same,
  flat,
  make_simulator,
  normal,
  params_of,
  sgd,
  train,
)

SIZES = (5, 17, 3, 8, 30, 1)


def trained(lanes):
  """Parameters and losses after two rounds of clients of unlike sizes."""
  data = blobs(SIZES, features=6, classes=3)
  task = MODELS["mlp"](data)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    data,
    clients_per_round=len(SIZES),
    batching=LocalBatching(batch_size=4, epochs=2),
    lanes=lanes,
  )
  return flat(params_of(simulator, train(simulator, 2)))


@pytest.mark.parametrize("lanes", [1, 4])
def test_clients_train_alike(monkeypatch, lanes):
  expected = trained(lanes)
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: "gpu")
    got = trained(lanes)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_each_lane_repeats_as_often_as_it_should(monkeypatch, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  counts = jnp.array([0, 3, 1, 7])

  def one(count, start):
    step = lambda i, carry, more: carry * 2 + i + more
    return repeat(count, step, start, jnp.float32(1))

  def plain(count, start):
    for i in range(count):
      start = start * 2 + i + 1
    return start

  got = jax.jit(jax.vmap(one))(counts, jnp.arange(4.0))
  expected = [plain(int(n), float(i)) for i, n in enumerate(counts)]
  np.testing.assert_array_equal(got, expected)
  for count, start in ((0, 5.0), (4, 5.0)):
    assert jax.jit(one)(count, start) == plain(count, start)


LABELS = jnp.array([0, 2, 4, 1, -1])  # the third and the last are no class


@pytest.mark.parametrize(
  "special", [0.0, 1e4, -jnp.inf], ids=["plain", "large", "impossible"]
)
def test_the_likelihood_of_a_label(monkeypatch, special):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
  logits = logits.at[0, 3].add(special)
  value = lambda z: negative_log_likelihood(z, LABELS)
  slope = jax.grad(lambda z: jnp.sum(jnp.where(LABELS >= 0, value(z), 0)))
  expected, slopes = value(logits), slope(logits)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert np.isnan(expected[jnp.array([2, 4])]).all()
  np.testing.assert_allclose(value(logits), expected, rtol=1e-5)
  np.testing.assert_allclose(slope(logits), slopes, rtol=1e-5, atol=1e-7)


def test_a_label_that_cannot_be_has_an_infinite_loss(monkeypatch):
  logits, label = jnp.array([[0.0, -jnp.inf]]), jnp.array([1])
  expected = negative_log_likelihood(logits, label)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert expected == negative_log_likelihood(logits, label) == jnp.inf


# --- convolution and pooling --------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def of_xla(x, kernel):
  order = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(
    x, kernel, (1, 1), "VALID", dimension_numbers=order
  )


def ours(x, kernel):
  return convolve(x, kernel, (1, 1), "VALID")


# Height, width and features in; out, of which few are summed by example.
SIZES_OF_CONVOLUTION = {
  "few": ((9, 7, 4), 2),
  "many": ((9, 7, 4), 40),
  "one place": ((3, 2, 1), 1),
  "none": ((2, 7, 4), 2),
}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("lanes", [None, 3])
@pytest.mark.parametrize("sizes", SIZES_OF_CONVOLUTION)
def test_convolution_and_its_derivatives(sizes, lanes):
  shape, features = SIZES_OF_CONVOLUTION[sizes]
  clients = () if lanes is None else (lanes,)
  with jax.enable_x64(True):
    x = normal(0, *clients, 5, *shape)
    kernel = normal(1, *clients, 3, 2, shape[-1], features)
    over = (lambda f: f) if lanes is None else jax.vmap
    check_same(over(ours), over(of_xla), x, kernel)
    changes = normal(2, *x.shape), normal(3, *kernel.shape)
    found, expected = (
      jax.jvp(over(each), (x, kernel), changes)[1] for each in (ours, of_xla)
    )
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("features", [1, 2 * FEW_FEATURES])
def test_few_features_are_summed_by_example(features):
  of = lambda k: ours(jnp.ones((3, FEW_FEATURES, 1, 2)), k).sum()
  kernel = jnp.ones((1, 1, 2, features))
  program = str(jax.make_jaxpr(jax.grad(of))(kernel))
  # Of each example, or of all together: what is multiplied last.
  assert (f"f32[3,{features},2]" in program) == (features == 1)


@pytest.mark.usefixtures("on_gpu")
def test_kernel_gradients_are_summed_in_single_precision():
  x = jnp.ones((512, FEW_FEATURES, 1, 1), jnp.bfloat16)
  of = lambda k: ours(x, k).astype(jnp.float32).sum()
  gradient = jax.grad(of)(jnp.ones((1, 1, 1, 1), jnp.bfloat16))
  assert gradient.dtype == jnp.bfloat16
  # In bfloat16 a sum of such terms ends at 256 of them.
  assert float(gradient[0, 0, 0, 0]) == 512 * FEW_FEATURES


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_train_alike(monkeypatch, dtype):
  def gradients():
    graph, params = nnx.split(conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    x = normal(0, 2, 512, 4, 6, 3).astype(dtype)

    def loss(params, x):
      y = max_pool(nnx.relu(nnx.merge(graph, params)(x)))
      return jnp.sum(y.astype(jnp.float32) ** 2)

    found = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
    return flat(found)

  expected = gradients()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  got = gradients()
  # bfloat16 has 8 bits, and rounds in other places.
  tolerance = 2e-6 if dtype == jnp.float32 else 2**-6
  atol = tolerance * np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
  ("strides", "expected"),
  [
    (2, [[0, 1, 0], [0, 0, 0], [0, 0, 0]]),
    (1, [[0, 1, 1], [1, 0, 0], [0, 0, 1]]),
  ],
)
def test_the_first_of_equal_maxima_gets_the_gradient(strides, expected):
  x = jnp.array([[1.0, 3, jnp.nan], [3, 3, 0], [2, 2, 9]])[None, ..., None]
  pooled = lambda x: max_pool(x, 2, strides)
  windows = (1, 2, 2, 1), (1, strides, strides, 1)
  values = lax.reduce_window(x, -jnp.inf, lax.max, *windows, "VALID")
  np.testing.assert_array_equal(pooled(x), values)
  found = jax.grad(lambda x: pooled(x).sum())(x)
  np.testing.assert_array_equal(found[0, ..., 0], expected)
