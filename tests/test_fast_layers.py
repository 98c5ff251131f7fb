"""Fast forms in the place of XLA's, against the program as it was written."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from fedjax_sim.cli import describe
from fedjax_sim.config import build, flags
from fedjax_sim.run import experiment
from fedjax_sim.tasks import (
  convolution,
  function_task,
  linen_task,
  nnx_task,
  with_compute_dtype,
)
from fedjax_sim.tasks.fast_layers import fast, slow_layers
from problems import check_same, normal
from tiers import slow_but

CLASSES, SIDE, BATCH, CLIENTS = 3, 9, 4, 3
DIGITS = pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py"
NUMBERS = ("NHWC", "HWIO", "NHWC")


class Net(nnx.Module):
  """Batch norm and dropout between convolutions, two kinds of pooling."""

  def __init__(self, rngs):
    self.first = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.second = nnx.Conv(4, 6, (3, 2), padding="VALID", rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.logits = nnx.Linear(6, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.max_pool(nnx.relu(self.norm(self.first(x))), (2, 2), (2, 2))
    x = nnx.avg_pool(self.dropout(self.second(x)), (2, 2), padding="SAME")
    return self.logits(x.mean((1, 2)))


class Strided(nnx.Module):
  """Strides, padding, dilation, groups and a transposed convolution."""

  def __init__(self, rngs):
    self.first = nnx.Conv(2, 8, (5, 5), strides=2, padding=2, rngs=rngs)
    self.second = nnx.Conv(
      8, 8, (3, 3), kernel_dilation=2, feature_group_count=8, rngs=rngs
    )
    self.third = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), rngs=rngs)
    self.logits = nnx.Linear(4, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = self.third(self.second(nnx.relu(self.first(x))))
    x = nnx.max_pool(x, (3, 3), (2, 2), padding="SAME")
    return self.logits(x.mean((1, 2)))


class Linen(linen.Module):
  """A convolution, under rematerialisation, and pooling."""

  @linen.compact
  def __call__(self, x):
    x = linen.relu(linen.remat(linen.Conv)(8, (3, 3), name="first")(x))
    x = linen.max_pool(x, (2, 2), strides=(2, 2))
    return linen.Dense(CLASSES)(x.reshape(len(x), -1))


def functions(fast_layers):
  """A loss of one example, over the batch by `vmap`, channels first."""

  def loss(params, examples):
    def one(x, y):
      x = lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0)[None], params["kernel"], (1, 1), "SAME"
      )
      x = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 3, 3), "VALID"
      )
      return -jax.nn.log_softmax(x[0].mean((1, 2)))[y]

    return jax.vmap(one)(examples["x"], examples["y"])

  def init(key):
    return {"kernel": jax.random.normal(key, (CLASSES, 2, 3, 3))}

  return function_task(init, loss, fast_layers=fast_layers)


SHAPE = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 2), jnp.float32)
TASKS = {
  "nnx": lambda wanted: nnx_task(Net, fast_layers=wanted),
  "strided": lambda wanted: nnx_task(Strided, fast_layers=wanted),
  "linen": lambda wanted: linen_task(Linen(), SHAPE, fast_layers=wanted),
  "function": functions,
}
EXAMPLES = {
  "x": np.random.default_rng(0).normal(size=(CLIENTS, *SHAPE.shape)),
  "y": np.random.default_rng(1).integers(0, CLASSES, (CLIENTS, BATCH)),
}


def trained(task: Any, variables: Any, examples: Any, key: Any) -> Any:
  """A kernel for each client, after steps in a loop under `vmap`."""

  def client(examples, key):
    def loss(params, buffers, i):
      before = variables._replace(params=params, buffers=buffers)
      out = task.loss(before, examples, jax.random.fold_in(key, i))
      return out.value.mean(), out.buffers

    def step(i, state):
      grads, buffers = jax.grad(loss, has_aux=True)(state[0], state[1], i)
      params = jax.tree.map(lambda p, g: p - 0.1 * g, state[0], grads)
      buffers = jax.tree.map(lambda b, a: b.astype(a.dtype), buffers, state[1])
      return params, buffers

    state = lax.fori_loop(0, 2, step, (variables.params, variables.buffers))
    after = variables._replace(params=state[0], buffers=state[1])
    return after, loss(state[0], state[1], 2), task.metrics(after, examples)

  keys = jax.random.split(key, CLIENTS)
  return jax.vmap(client)(examples, keys)


@pytest.mark.parametrize(
  ("name", "dtype", "bound"),
  slow_but(
    [("function", jnp.float64, 1e-12)],
    [
      ("nnx", jnp.float32, 1e-5),
      *((name, jnp.float64, 1e-12) for name in TASKS),
    ],
  ),
)
def test_training_is_that_of_the_plain_program(name, dtype, bound):
  with jax.enable_x64(dtype == jnp.float64):
    key = jax.random.key(0)
    variables = jax.tree.map(
      lambda x: x.astype(dtype), TASKS[name](False).init(key)
    )
    x = jnp.asarray(EXAMPLES["x"], dtype)
    arguments = variables, EXAMPLES | {"x": x}, key

    def run(wanted):
      function = functools.partial(trained, TASKS[name](wanted))
      return jax.jit(function).trace(*arguments)

    assert "conv_general_dilated" in str(run(False).jaxpr)
    text = str(run(True).jaxpr)
    assert "conv_general_dilated" not in text
    assert "reduce_window" not in text
    found, expected = (
      run(wanted).lower().compile()(*arguments) for wanted in (True, False)
    )
    jax.tree.map(lambda a, b: None, found, expected)  # of one structure
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
      assert a.dtype == b.dtype
      scale = 1 + float(jnp.abs(b).max())
      np.testing.assert_allclose(a, b, rtol=0, atol=bound * scale)


def conv(x, k):
  return lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=NUMBERS
  )


def test_in_all_kinds_of_programs():
  def scanned(x, k):
    return lax.scan(lambda x, k: (jnp.sin(conv(x, k)), None), x, k)[0]

  def branched(x, k):
    yes = lambda: jax.jit(conv)(x, k[0])
    return lax.cond(x[0, 0, 0, 0] > 0, yes, lambda: 2 * x)

  def kept(x, k):
    return jax.checkpoint(lambda x: conv(jnp.sin(conv(x, k[0])), k[1]))(x)

  def looped(x, k):
    return lax.while_loop(
      lambda s: s[0] < 2, lambda s: (s[0] + 1, conv(s[1], k[1])), (0, x)
    )[1]

  with jax.enable_x64(True):
    x, k = normal(0, 2, 5, 5, 3), normal(1, 2, 3, 3, 3, 3) / 3
    for function in (scanned, branched, kept):
      assert slow_layers(function, x, k)
      assert not slow_layers(fast(function), x, k)
      check_same(fast(function), function, x, k)
    assert not slow_layers(fast(looped), x, k)
    np.testing.assert_allclose(fast(looped)(x, k), looped(x, k), atol=1e-12)


def test_a_derivative_of_ones_own_is_kept():
  @jax.custom_vjp
  def doubled(x, k):
    return conv(x, k)

  doubled.defvjp(
    lambda x, k: (conv(x, k), (x, k)),
    lambda saved, g: tuple(2 * d for d in jax.vjp(conv, *saved)[1](g)),
  )

  @jax.custom_jvp
  def tripled(x, k):
    return conv(x, k)

  @tripled.defjvp
  def _(primals, tangents):
    value, change = jax.jvp(conv, primals, tangents)
    return value, 3 * change

  with jax.enable_x64(True):
    x, k = normal(0, 2, 5, 5, 3), normal(1, 3, 3, 3, 3)
    for function, factor in ((doubled, 2), (tripled, 3)):
      assert not slow_layers(fast(function), x, k)  # of its value
      check_same(fast(function), function, x, k)
      grad = lambda f, a: jax.grad(lambda x: f(x, k).sum())(a)
      np.testing.assert_allclose(
        grad(fast(function), x), factor * grad(conv, x), atol=1e-10
      )


def test_gradients_inside_a_function():
  """Of a penalty on them: XLA's gradient of pooling is left, and told."""

  def value(x, k):
    y = lax.reduce_window(
      conv(x, k), -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return jnp.sum(jnp.sin(y))

  def penalty(x, k):
    return jnp.sum(jax.grad(value)(x, k) ** 2)

  with jax.enable_x64(True):
    x, k = normal(0, 2, 4, 4, 3), normal(1, 3, 3, 3, 3)
    check_same(fast(penalty), penalty, x, k)
    (left,) = slow_layers(fast(penalty), x, k)
    assert left.startswith("the gradient of pooling of ")


def test_dtypes_and_scopes_stay():
  def of(x, k):
    with jax.named_scope("mine"):
      return lax.conv_general_dilated(
        x,
        k,
        (1, 1),
        "SAME",
        dimension_numbers=NUMBERS,
        preferred_element_type=jnp.float32,
      )

  half = jax.ShapeDtypeStruct((2, 5, 5, 8), jnp.bfloat16)
  kernel = jax.ShapeDtypeStruct((3, 3, 8, 4), jnp.bfloat16)
  lowered = jax.jit(fast(of)).lower(half, kernel)
  assert lowered.out_info.dtype == jnp.float32
  text = lowered.as_text(debug_info=True)
  assert "mine/" in text
  assert "stablehlo.convolution" not in text
  task = with_compute_dtype(TASKS["linen"](True), jnp.bfloat16)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  examples = {k: jnp.asarray(v[0]) for k, v in EXAMPLES.items()}
  loss = jax.eval_shape(task.loss, shapes, examples, jax.random.key(0))
  assert loss.value.dtype == jnp.float32


def test_a_function_without_layers_is_called_itself():
  found = []

  def of(x):
    found.append(x)
    return {"sum": x.sum(), "of": 3}

  text = str(jax.make_jaxpr(fast(of))(jnp.ones(3)))
  assert text == str(jax.make_jaxpr(of)(jnp.ones(3)))
  assert fast(of)(jnp.ones(3))["of"] == 3


def test_named_arguments():
  def of(x, *, k, scale=1.0):
    return scale * conv(x, k)

  x, k = normal(0, 2, 5, 5, 3), normal(1, 3, 3, 3, 4)
  np.testing.assert_allclose(
    fast(of)(x, scale=2.0, k=k), of(x, k=k, scale=2.0), atol=1e-5
  )
  assert len(slow_layers(of, x, k=k)) == 1
  assert not slow_layers(fast(of), x, k=k)
  plain = fast(lambda x, k: x + k)
  np.testing.assert_array_equal(plain(x, k=x), 2 * x)


def test_layers_that_are_too_large_are_told(monkeypatch):
  monkeypatch.setattr(convolution, "MOST_BYTES", 100)
  # Of a shape of its own: forms of others are traced already.
  x, k = jnp.ones((2, 7, 5, 3)), jnp.ones((3, 3, 3, 4))
  (left,) = slow_layers(fast(conv), x, k)
  assert left.startswith("convolution of (2, 7, 5, 3) by (3, 3, 3, 4)")


def test_a_form_is_traced_once():
  x, k = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
  calls = [
    equation.params["jaxpr"]
    for _ in range(2)
    for equation in jax.make_jaxpr(fast(lambda x, k: conv(x, k)))(x, k).eqns
  ]
  assert len(calls) == 2
  assert calls[0] is calls[1]  # and so it is compiled once


def test_it_can_be_switched(monkeypatch):
  key = jax.random.key(0)
  examples = {k: v[0] for k, v in EXAMPLES.items()}

  def left(wanted):
    task = TASKS["nnx"](wanted)
    variables = jax.eval_shape(task.init, key)
    return [
      len(slow_layers(task.loss, variables, examples, key)),
      len(slow_layers(task.metrics, variables, examples)),
      len(slow_layers(task.logits, variables, examples)),
    ]

  assert left(True) == [0, 0, 0]
  assert left(False) == [4, 4, 4]
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert left(None) == [0, 0, 0]
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert left(None) == [4, 4, 4]
  with pytest.raises(TypeError, match="fast_layers='yes'"):
    TASKS["function"]("yes")


MODEL = """
import jax
from jax import lax
from fedjax_sim.tasks.fast_layers import with_fast_layers
from fedjax_sim.tasks import function_task

def make(example_shape, num_classes):
  def init(key):
    return {"short": jax.random.normal(key, (3, 1, num_classes)) / 3,
            "long": jax.random.normal(key, (150, 1, 1)) / 150}
  def loss(params, examples):
    x = examples["x"].reshape(-1, example_shape[0], 1)
    numbers = ("NHC", "HIO", "NHC")
    x = lax.conv_general_dilated(
      x, params["long"], (1,), "SAME", dimension_numbers=numbers)
    x = lax.conv_general_dilated(
      x, params["short"], (2,), "SAME", dimension_numbers=numbers)
    scores = jax.nn.log_softmax(x.max(1))
    return -(scores * jax.nn.one_hot(examples["y"], num_classes)).sum(1)
  return function_task(init, loss, fast_layers=False)

def mended(example_shape, num_classes):
  return with_fast_layers(make(example_shape, num_classes))
"""


SHORT, LONG = "(model.py:16)", "(model.py:14)"  # one has a faster form


def config_of(folder, name):
  (folder / "model.py").write_text(MODEL)
  fields = {
    "model.name": f"{folder / 'model.py'}:{name}",
    "model.hidden_sizes": "None",
    "server.rounds": "1",
    "server.clients_per_round": "2",
    "runtime.lanes": "1",
    "runtime.devices": "1",
  }
  return flags.load(str(DIGITS), fields)


def check_told(words):
  mended, left = words.split("with_fast_layers(task)")
  assert SHORT in mended
  assert LONG not in mended
  assert LONG in left
  assert "no faster form" in left


on_cpu = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="slow on a CPU"
)


@on_cpu
def test_what_stays_slow_is_named(tmp_path):
  simulator = build.build(config_of(tmp_path, "make")).simulator
  check_told(" ".join(simulator.slow_layers))
  (left,) = build.build(config_of(tmp_path, "mended")).simulator.slow_layers
  assert "no faster form" in left
  assert SHORT not in left


@pytest.mark.usefixtures("no_pictures")
@on_cpu
@pytest.mark.slow
def test_a_run_tells_what_stays_slow(tmp_path, capsys):
  source = config_of(tmp_path, "make")
  experiment.run(source, tmp_path / "run")
  check_told(" ".join("".join(capsys.readouterr()).split()))
  text = describe.describe(build.build(source))
  (fact,) = [x for x in text.splitlines() if x.startswith("slow layers")]
  check_told(fact)
