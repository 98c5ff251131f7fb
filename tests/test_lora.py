"""Adapters: the model they make, what trains, what a lane takes, their mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedex_lora import fedex_lora
from fedjax_sim.config import build, default_config
from fedjax_sim.core.tree import all_finite, nbytes, paths_of
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.layers import LSTM
from fedjax_sim.models.mlp import mlp
from fedjax_sim.tasks import function_task, linen_task, nnx_task
from fedjax_sim.tasks.freezing import (
  named_variables,
  with_frozen,
  with_frozen_dtype,
  with_kept_buffers,
)
from fedjax_sim.tasks.lora import (
  adapters_of,
  merged,
  unadapted,
  with_kernels,
  with_lora,
)
from fedjax_sim.tasks.low_rank import LowRank, evaluate
from problems import (
  blobs,
  make_simulator,
  normal,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
EXAMPLES = {"x": jnp.asarray(X), "y": jnp.arange(3)}


class Attention(nnx.Module):
  """Attention, a rematerialized dense layer, a convolution, and an LSTM."""

  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.dense = nnx.Linear(8, 8, rngs=rngs)
    self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
    self.lstm = LSTM(8, 4, rngs=rngs)
    self.logits = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    h = self.attention(x)
    h = nnx.relu(nnx.remat(lambda layer, h: layer(h))(self.dense, h))
    h = self.lstm(nnx.silu(self.conv(h)).swapaxes(0, 1))
    return self.logits(h[-1])


class Dense(linen.Module):
  """Two dense layers, the second one tied to the first."""

  @linen.compact
  def __call__(self, x):
    h = linen.tanh(linen.Dense(4, name="first")(x.mean(1)))
    kernel = self.variables["params"]["first"]["kernel"]
    return linen.Dense(3, name="second")(h @ kernel.T)


def looped(params, examples):
  """The loss of layers in a loop."""
  layer = lambda h, w: (jnp.tanh(h @ w), None)
  h, _ = jax.lax.scan(layer, examples["x"].mean(1), params["stack"])
  return jnp.sum((h @ params["out"]) ** 2, axis=-1)


TASKS = {
  "nnx": (
    lambda: nnx_task(Attention),
    ("attention/.*/kernel", "dense/kernel", "conv/kernel", "lstm/recurrent"),
  ),
  "linen": (
    lambda: linen_task(Dense(), jax.ShapeDtypeStruct((1, 6, 8), jnp.float32)),
    (".*first/kernel",),
  ),
  "function": (
    lambda: function_task(
      lambda key: {"stack": normal(0, 2, 8, 8), "out": normal(1, 8, 5)}, looped
    ),
    ("stack", "out"),
  ),
}


def scattered(variables, scale=0.3):
  """The variables with other adapters than those of the beginning."""
  leaves, treedef = jax.tree.flatten(variables.params)
  rng = np.random.default_rng(1)
  leaves = [x + scale * rng.normal(size=x.shape).astype("f") for x in leaves]
  return variables._replace(params=jax.tree.unflatten(treedef, leaves))


@pytest.mark.parametrize("name", slow_but(["nnx", "function"], TASKS))
def test_an_adapted_model_is_the_model_with_changed_kernels(name):
  make, targets = TASKS[name]
  task, key = make(), jax.random.key(0)
  adapted = with_lora(task, targets, 2, alpha=6.0)
  begun = adapted.init(key)
  loss = lambda task: jax.jit(lambda v: task.loss(v, EXAMPLES, key).value)
  np.testing.assert_allclose(
    loss(adapted)(begun), loss(task)(task.init(key)), rtol=1e-5
  )
  changed = scattered(begun)
  whole = merged(changed)
  assert paths_of(whole) == paths_of(task.init(key))
  np.testing.assert_allclose(
    loss(adapted)(changed), loss(task)(whole), rtol=2e-5, atol=1e-6
  )

  def gradient(value):
    of = lambda params: jnp.sum(value(changed._replace(params=params)))
    return jax.jit(jax.grad(of))(changed.params)

  by_parts = gradient(lambda v: adapted.loss(v, EXAMPLES, key).value)
  by_whole = gradient(lambda v: task.loss(merged(v), EXAMPLES, key).value)
  for x, y in zip(*map(jax.tree.leaves, (by_parts, by_whole)), strict=True):
    assert np.abs(y).max() > 0
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5 * np.abs(y).max())


def test_factors_follow_the_shape_of_the_bias():
  task = with_lora(nnx_task(Attention), ("attention/.*/kernel",), 2)
  params = jax.eval_shape(task.init, jax.random.key(0)).params
  shapes = dict(zip(paths_of(params), jax.tree.leaves(params), strict=True))
  assert {k: v.shape for k, v in shapes.items()} == {
    **{
      f"attention/{name}/kernel/lora_{part}": shape
      for name in ("query", "key", "value")
      for part, shape in (("a", (8, 2)), ("b", (2, 2, 4)))
    },
    "attention/out/kernel/lora_a": (2, 4, 2),
    "attention/out/kernel/lora_b": (2, 8),
  }


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_attention_without_biases_is_adapted_as_with_them(library):
  if library == "nnx":
    model = nnx_task(
      lambda rngs: nnx.MultiHeadAttention(
        4, 8, use_bias=False, decode=False, rngs=rngs
      )
    )
  else:
    model = linen_task(
      linen.MultiHeadDotProductAttention(4, use_bias=False),
      jax.ShapeDtypeStruct((1, 6, 8), jnp.float32),
    )
  task = with_lora(model, (".*kernel",), 2)
  like = jax.eval_shape(task.init, KEY)
  factors = {
    tuple(path.split("/")[-3:]): x.shape
    for path, x in named_variables(like._replace(frozen=())).items()
  }
  assert factors == {
    **{
      (name, "kernel", f"lora_{part}"): shape
      for name in ("query", "key", "value")
      for part, shape in (("a", (8, 2)), ("b", (2, 4, 2)))
    },
    ("out", "kernel", "lora_a"): (4, 2, 2),
    ("out", "kernel", "lora_b"): (2, 8),
  }
  assert task.logits is not None
  program = jax.make_jaxpr(task.logits)(like, EXAMPLES)
  made = {v.aval.shape for e in program.eqns for v in e.outvars}
  assert (3, 6, 8) in made  # the outputs: the products are not in calls
  assert not made & {(8, 4, 2), (4, 2, 8)}  # no kernel is multiplied out


def test_the_derivative_of_a_function_that_has_its_own_is_kept():
  """A straight-through estimate, of which the primal's derivative is 0."""

  @jax.custom_jvp
  def rounded(w):
    return jnp.round(w)

  rounded.defjvp(lambda given, change: (jnp.round(*given), *change))
  base, a, b = normal(0, 5, 4), normal(1, 5, 2), normal(2, 2, 4)
  x = normal(3, 3, 5)
  loss = lambda w: jnp.sum(jnp.sin(x @ rounded(w)))
  found = jax.grad(lambda a: evaluate(loss, LowRank(base, a, b, 0.5)))(a)
  slope = x.T @ np.cos(x @ np.round(base + 0.5 * a @ b))
  np.testing.assert_allclose(found, 0.5 * slope @ b.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left", "transposed"])
def test_products_with_a_matrix_in_parts(side):
  base, a, b = normal(0, 5, 3, 4), normal(1, 5, 2), normal(2, 2, 3, 4)
  x = {"right": normal(3, 7, 5), "left": normal(3, 5, 7)}.get(
    side, normal(3, 3, 7, 4)
  )
  product = {
    "right": lambda m, x: jnp.tensordot(x, m, 1),
    "left": lambda m, x: jnp.einsum("ijk,in->jkn", m, x),
    "transposed": lambda m, x: jnp.einsum("ijk,jnk->ni", m, x),
  }[side]
  low = LowRank(base, a, b, 0.5)
  found = evaluate(product, low, x)
  expected = product(
    np.asarray(base) + 0.5 * np.einsum("ir,rjk->ijk", a, b), np.asarray(x)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  program = jax.make_jaxpr(
    lambda base, a, b: evaluate(product, LowRank(base, a, b, 0.5), x)
  )
  shapes = [v.aval.shape for e in program(base, a, b).eqns for v in e.outvars]
  assert base.shape not in shapes


def test_a_further_lane_takes_no_further_kernel():
  """By XLA's own numbers, of a step of many lanes and of few."""
  width, batch = 256, 2
  kernel = 4 * width * width
  plain = mlp((width,), 3, (width, width))
  adapted = with_lora(plain, ("layers/[01]/kernel",), 1)

  def bytes_of(task, lanes):
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    stacked = lambda tree, n: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), tree
    )
    examples = {
      "x": jax.ShapeDtypeStruct((batch, width), np.float32),
      "y": jax.ShapeDtypeStruct((batch,), np.int32),
    }

    def step(params, frozen, examples):
      loss = lambda p: jnp.sum(
        task.loss(
          shapes._replace(params=p, frozen=frozen),
          examples,
          jax.random.key(0),
        ).value
      )
      return jax.grad(loss)(params)

    lowered = jax.jit(jax.vmap(step, (0, None, 0))).lower(
      stacked(shapes.params, lanes), shapes.frozen, stacked(examples, lanes)
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return (
      memory.temp_size_in_bytes
      + memory.argument_size_in_bytes
      + memory.output_size_in_bytes
    )

  lane = (bytes_of(adapted, 6) - bytes_of(adapted, 2)) / 4
  whole = (bytes_of(plain, 6) - bytes_of(plain, 2)) / 4
  assert whole > 2 * 2 * kernel  # two layers, and their gradients
  assert lane < 0.2 * kernel


def test_a_base_in_bfloat16_is_rounded_once_and_takes_half():
  key = KEY
  plain = with_lora(mlp((64,), 3, (64, 64)), ("layers/[01]/kernel",), 2)
  task = with_frozen_dtype(plain, jnp.bfloat16)
  variables, begun = jax.jit(task.init)(key), jax.jit(plain.init)(key)
  half = nbytes(variables.frozen) / nbytes(begun.frozen)
  assert 0.5 <= half < 0.51  # single numbers stay
  assert {x.dtype.name for x in jax.tree.leaves(variables.params)} == {
    "float32"
  }
  low = lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim else x
  rounded = scattered(begun._replace(frozen=jax.tree.map(low, begun.frozen)))
  kept = variables._replace(params=rounded.params)
  examples = {"x": normal(1, 4, 64).astype(np.float32), "y": jnp.arange(4) % 3}

  def slope(task, variables):
    def mean(params):
      given = variables._replace(params=params)
      return task.loss(given, examples, key).value.mean()

    return jax.jit(jax.grad(mean))(variables.params)

  found, expected = slope(task, kept), slope(plain, rounded)
  for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_adapters_are_found_beside_kept_buffers_and_other_frozen_parameters():
  def net(rngs):
    return nnx.Sequential(
      nnx.Linear(8, 6, rngs=rngs),
      nnx.BatchNorm(6, rngs=rngs),
      nnx.Linear(6, 3, rngs=rngs),
    )

  model = with_frozen(nnx_task(net), ("layers/2/",))
  task = with_lora(model, ("layers/0/kernel",), 2, alpha=3.0)
  variables = scattered(jax.jit(with_kept_buffers(task).init)(KEY))
  ((path, adapter),) = adapters_of(variables).items()
  assert path == "layers/0/kernel"
  whole, base = merged(variables), unadapted(variables)
  expected = jax.eval_shape(with_kept_buffers(model).init, KEY)
  for made in (whole, base):
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, expected)
    assert [*named_variables(made)] == [*named_variables(expected)]
  assert {*named_variables(variables)} == {
    *named_variables(expected),
    *(f"layers/0/kernel/lora_{part}" for part in "ab"),
    "frozen/layers/0/kernel/lora_scale",
  }
  named = named_variables(whole)
  np.testing.assert_allclose(
    named[path] - named_variables(base)[path],
    1.5 * np.asarray(adapter.a) @ np.asarray(adapter.b),
    atol=1e-6,
  )
  other = with_kernels(variables, {path: adapter.base + 1})
  np.testing.assert_array_equal(adapters_of(other)[path].base, adapter.base + 1)
  assert str(jax.tree.structure(other)) == str(jax.tree.structure(variables))
  for plain in (model, with_kept_buffers(model), nnx_task(net)):
    assert adapters_of(jax.eval_shape(plain.init, KEY)) == {}


# --- rounds -------------------------------------------------------------------

DATA = blobs([8, 8, 4], seed=3)
BATCHING = LocalBatching(batch_size=8, shuffle=False)
TARGETS = ("layers/0/kernel",)


def task_of(**options):
  model = mlp(DATA.example_shape, DATA.num_classes, (5,))
  return with_lora(model, TARGETS, 2, alpha=3.0, also=("layers/1/",), **options)


def simulator_of(algorithm, task, data=DATA, **options):
  return make_simulator(
    task,
    algorithm(task, sgd(0.5), sgd(1.0)),
    data,
    batching=BATCHING,
    **options,
  )


def whole_of(simulator, state):
  variables = simulator.algorithm.variables(state.server)
  return jax.tree.leaves(jax.device_get(merged(variables).params))


def mean_of_clients(task, begun):
  """The weighted mean of the models of single clients after a round."""

  def mean_loss(params, examples):
    variables = begun._replace(params=params)
    return task.loss(variables, examples, jax.random.key(0)).value.mean()

  models = []
  for i in range(3):
    step = jax.jit(jax.grad(mean_loss))
    gradient = step(begun.params, DATA.train.client(i))
    params = jax.tree.map(lambda p, g: p - 0.5 * g, begun.params, gradient)
    models.append(jax.tree.leaves(merged(begun._replace(params=params)).params))
  return [
    np.average(x, axis=0, weights=[8, 8, 4]) for x in zip(*models, strict=True)
  ]


@pytest.mark.parametrize(
  ("algorithm", "options", "exact"),
  [
    (fedavg, {}, False),
    (fedavg, {"fixed_a": True}, True),
    (fedex_lora, {}, True),
  ],
)
def test_whether_the_new_model_is_the_mean_of_the_clients(
  algorithm, options, exact
):
  task = task_of(**options)
  aggregator = None if algorithm is fedavg else aggregators.stack()
  simulator = simulator_of(algorithm, task, aggregator=aggregator)
  state = train(simulator, 2)  # in the first round B begins at 0
  begun = jax.device_get(simulator.algorithm.variables(state.server))
  after = whole_of(simulator, train(simulator, 3))
  expected = mean_of_clients(task, begun)
  far = max(np.abs(a - b).max() for a, b in zip(after, expected, strict=True))
  if exact:
    assert far < 1e-6
  else:
    assert far > 1e-4


def test_kernels_that_overflow_end_the_run_in_that_round():
  """The clients' updates are finite, and the mean of their products is not."""
  data = blobs([8, 8, 4])
  x = data.train.examples["x"].copy()
  x[8:16] *= 1e12  # of one client
  given = dataclasses.replace(
    data.train, examples={**data.train.examples, "x": x}
  )
  simulator = make_simulator(
    task_of(),
    fedex_lora(task_of(), sgd(0.5), sgd(1.0)),
    dataclasses.replace(data, train=given),
    batching=LocalBatching(batch_size=4, shuffle=False),
    aggregator=aggregators.stack(),
  )
  out = next(iter(simulator.run(simulator.init(), 1)))
  after = simulator.algorithm.variables(out.state.server)
  assert all_finite(after.params)
  assert not all_finite(after.frozen)
  assert "Round 1: the global model is not finite" in str(out.failure)


def test_frozen_numbers_that_no_algorithm_changes_are_not_read_through():
  """An infinite bound is not a failure; nobody has looked at it."""
  plain, bound = quadratic(2), {"high": jnp.full((), jnp.inf)}
  task = plain._replace(init=lambda key: plain.init(key)._replace(frozen=bound))
  simulator = simulator_of(fedavg, task, quadratic_data([[1, 2], [3, 4]]))
  after = simulator.algorithm.variables(train(simulator, 1).server)
  np.testing.assert_allclose(after.params["w"], [1, 1.5], rtol=1e-6)
  assert np.isinf(after.frozen["high"])


def test_fedex_lora_needs_adapters():
  plain = mlp(DATA.example_shape, DATA.num_classes, (5,))
  for task in (plain, task_of(fixed_a=True)):
    with pytest.raises(ValueError, match="both factors train"):
      fedex_lora(task, sgd(0.5), sgd(1.0))


def test_fedex_lora_needs_kernels_that_keep_small_differences():
  task = with_frozen_dtype(task_of(), jnp.bfloat16)
  with pytest.raises(
    ValueError, match=r"bfloat16 would lose; keep it in float32"
  ):
    fedex_lora(task, sgd(0.5), sgd(1.0))


def test_only_adapters_are_sent():
  simulator = simulator_of(fedavg, task_of(), lanes=2)
  (out,) = simulator.run(simulator.init(), 1)
  numbers = 6 * 2 + 2 * 5 + 5 * 3 + 3  # A, B, and the second layer
  assert out.rows[0]["bytes_up"] == 3 * 4 * (numbers + 1)  # with the weight
  assert out.rows[0]["bytes_down"] == 3 * 4 * numbers
  exact = simulator_of(fedex_lora, task_of(), aggregator=aggregators.stack())
  (out,) = exact.run(exact.init(), 1)
  assert out.rows[0]["bytes_down"] == 3 * 4 * (numbers + 6 * 5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"targets": ("layers/9/",)}, r"adapter\.targets=.* matches no parameter"),
    ({"targets": ("layers/0/",)}, r"'layers/0/bias', shape \(32,\)"),
    ({"rank": 32}, r"adapter\.rank=32 is no low rank .* at most 31"),
    ({"rank": 0}, r"adapter\.rank=0 is out of range"),
    ({"alpha": -1.0}, r"adapter\.alpha=-1\.0 is out of range"),
    ({"also": ("layers/0/",)}, r"both match 'layers/0/kernel'"),
  ],
)
def test_what_is_refused(changes, message):
  config = default_config()
  config.model.name = "mlp"
  config.model.hidden_sizes = (32,)
  config.adapter.name = "lora"
  config.adapter.targets = ("layers/0/kernel",)
  config.adapter.update(changes)
  with pytest.raises((TypeError, ValueError), match=message):
    build.build(config)


def test_what_is_frozen_has_a_dtype_only_if_something_is():
  config = default_config()
  config.runtime.frozen_dtype = "bfloat16"
  with pytest.raises(ValueError, match=r"frozen_dtype='bfloat16' is for what"):
    build.build(config)
