"""Tasks: variables, modes, random streams, precision, masked means."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedjax_sim import aggregators, core, transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Batch, Loss, Metric, Task, Variables
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.mlp import mlp
from fedjax_sim.simulation.preflight import ModelError
from fedjax_sim.tasks import (
  function_task,
  linen_task,
  losses,
  nnx_task,
  with_compute_dtype,
  with_remat,
)
from fedjax_sim.tasks.freezing import with_frozen
from fedjax_sim.tasks.metrics import MetricError, with_metrics
from fedjax_sim.training.optimizers import optimizer
from problems import blobs, flat, make_simulator, params_of, sgd, train
from tiers import slow_but

FEATURES, HIDDEN, CLASSES = 6, 5, 3
MOMENTUM = 0.5
KEY = jax.random.key(0)


class Base(nnx.Param):
  """A parameter of the base model, which nobody trains."""


class Net(nnx.Module):
  """Everything at once: a frozen base, batch norm, dropout, own noise."""

  def __init__(self, rngs):
    base = rngs.params.normal((FEATURES, HIDDEN))
    self.base = Base(base)
    self.delta = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
    self.norm = nnx.BatchNorm(HIDDEN, momentum=MOMENTUM, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)
    self.rngs = nnx.Rngs(noise=rngs.params())
    self.deterministic = True

  def __call__(self, x):
    h = x @ self.base + self.delta(x)
    h = self.dropout(nnx.relu(self.norm(h)))
    if not self.deterministic:
      h = h + 0.1 * self.rngs.noise.uniform(h.shape, h.dtype)
    return self.head(h)


def net_task():
  return nnx_task(Net, trainable=nnx.All(nnx.Param, nnx.Not(Base)))


class LinenNet(linen.Module):
  """Batch norm and dropout in linen."""

  @linen.compact
  def __call__(self, x, train):
    h = linen.Dense(HIDDEN)(x)
    h = linen.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(h)
    h = linen.Dropout(0.5, deterministic=not train)(linen.relu(h))
    return linen.Dense(CLASSES)(h)


def linen_net_task():
  x = jax.ShapeDtypeStruct((2, FEATURES), jnp.float32)
  return linen_task(LinenNet(), x, train_argument="train")


NETS = {"nnx": net_task(), "linen": linen_net_task()}


@functools.cache
def variables_of(net):
  return jax.jit(NETS[net].init)(KEY)


def layers(name, variables):
  """(base, kernel, bias, scale, offset, mean, var, head, head bias)."""
  p, b = variables.params, variables.buffers
  if name == "nnx":
    arrays = (
      variables.frozen["base"][...],
      p["delta"]["kernel"][...],
      p["delta"]["bias"][...],
      p["norm"]["scale"][...],
      p["norm"]["bias"][...],
      b["norm"]["mean"][...],
      b["norm"]["var"][...],
      p["head"]["kernel"][...],
      p["head"]["bias"][...],
    )
  else:
    arrays = (
      np.zeros((FEATURES, HIDDEN)),
      p["Dense_0"]["kernel"],
      p["Dense_0"]["bias"],
      p["BatchNorm_0"]["scale"],
      p["BatchNorm_0"]["bias"],
      b["batch_stats"]["BatchNorm_0"]["mean"],
      b["batch_stats"]["BatchNorm_0"]["var"],
      p["Dense_1"]["kernel"],
      p["Dense_1"]["bias"],
    )
  return [np.asarray(a, np.float64) for a in arrays]


def batch_of(size=4, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(size, FEATURES)).astype(np.float32),
    "y": rng.integers(0, CLASSES, size).astype(np.int32),
  }


def names(tree):
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  keys = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
  return {key.removesuffix("/value") for key in keys}


# --- nnx and linen: variables, modes, random streams --------------------------


def test_nnx_variables_are_split_into_trained_buffers_and_frozen():
  variables = variables_of("nnx")
  assert names(variables.params) == {
    "delta/kernel",
    "delta/bias",
    "norm/scale",
    "norm/bias",
    "head/kernel",
    "head/bias",
  }
  assert names(variables.buffers) == {"norm/mean", "norm/var"}
  assert names(variables.frozen) == {"base"}


def test_lora_trains_the_adapters_alone():
  task = nnx_task(
    lambda rngs: nnx.LoRALinear(FEATURES, CLASSES, lora_rank=2, rngs=rngs),
    trainable=nnx.LoRAParam,
  )
  variables = task.init(KEY)
  assert names(variables.params) == {"lora/lora_a", "lora/lora_b"}
  assert names(variables.frozen) == {"kernel", "bias"}
  simulator = make_simulator(
    task, fedavg(task, sgd(0.5), sgd(1.0)), blobs([4, 6])
  )
  before = simulator.init().server.variables
  after = train(simulator, 2).server.variables
  np.testing.assert_array_equal(flat(after.frozen), flat(before.frozen))
  assert np.abs(flat(after.params) - flat(before.params)).max() > 1e-2


def test_init_depends_on_the_key_and_so_do_its_parts():
  init = jax.jit(NETS["nnx"].init)
  one, same, other = (init(jax.random.key(s)) for s in (0, 0, 1))
  np.testing.assert_array_equal(flat(one), flat(same))
  kernels = [layers("nnx", v)[i] for v in (one, other) for i in (0, 1)]
  for i in range(4):
    for j in range(i):
      assert np.abs(kernels[i] - kernels[j]).max() > 0.1


@pytest.mark.parametrize("net", NETS)
def test_evaluation_is_deterministic_and_uses_the_running_statistics(net):
  task, variables = NETS[net], variables_of(net)
  train_one = jax.jit(task.loss)
  for seed in range(3):  # statistics other than those of the start
    loss = train_one(variables, batch_of(4, seed), jax.random.key(seed))
    variables = variables._replace(buffers=loss.buffers)
  examples = batch_of(7, 9)

  base_, kernel, bias, scale, offset, mean, var, head, last = layers(
    net, variables
  )
  h = examples["x"] @ (base_ + kernel) + bias
  h = (h - mean) / np.sqrt(var + 1e-5) * scale + offset
  logits = np.maximum(h, 0) @ head + last
  logits -= logits.max(axis=1, keepdims=True)
  nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(7), examples["y"]]

  metrics = jax.jit(task.metrics)
  for _ in range(2):
    out = metrics(variables, examples)
    np.testing.assert_allclose(out["loss"].total, nll, rtol=1e-4, atol=1e-5)
    hits = logits.argmax(1) == examples["y"]
    np.testing.assert_array_equal(out["accuracy"].total, hits)
    np.testing.assert_array_equal(out["accuracy"].weight, np.ones(7))


@pytest.mark.parametrize("net", NETS)
def test_training_changes_none_of_the_callers_variables(net):
  task, variables = NETS[net], variables_of(net)
  before = jax.tree.map(np.array, variables)

  @jax.jit
  def gradient(params, key):
    def value(params):
      mine = variables._replace(params=params)
      loss = task.loss(mine, batch_of(), key)
      return jnp.sum(loss.value), loss.buffers

    return jax.grad(value, has_aux=True)(params)

  slope, buffers = gradient(variables.params, KEY)
  assert np.abs(flat(slope)).max() > 0
  assert np.abs(flat(buffers) - flat(variables.buffers)).max() > 0.01
  np.testing.assert_array_equal(flat(variables), flat(before))


class Masks(nnx.Module):
  """Three random bits a unit: of two dropouts, and of a stream of its own."""

  def __init__(self, rngs):
    self.first = nnx.Dropout(0.5, rngs=rngs)
    self.second = nnx.Dropout(0.5, rngs=rngs)
    self.rngs = nnx.Rngs(noise=0)

  def __call__(self, x):
    own = self.rngs.noise.bernoulli(0.5, x.shape)
    return self.first(x) > 0, self.second(x) > 0, own


class LinenMasks(linen.Module):
  """The same in linen."""

  @linen.compact
  def __call__(self, x, train):
    own = jax.random.bernoulli(self.make_rng("noise"), 0.5, x.shape)
    drop = lambda: linen.Dropout(0.5, deterministic=not train)(x) > 0
    return drop(), drop(), own


UNITS = 7


def as_number(bits, examples):
  """Each example's bits as one number, exact in float32."""
  bits = jnp.concatenate(bits, axis=-1)
  value = bits.astype(jnp.float32) @ (2.0 ** jnp.arange(3 * UNITS))
  return value, jnp.ones_like(value)


def masks_task(kind):
  if kind == "nnx":
    return nnx_task(Masks, loss=as_number)
  return linen_task(
    LinenMasks(),
    jax.ShapeDtypeStruct((1, UNITS), jnp.float32),
    loss=as_number,
    train_argument="train",
    streams=("dropout", "noise"),
  )


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_every_lane_step_example_and_stream_has_its_own_masks(kind):
  lanes, steps, batch = 4, 3, 2
  examples = {"x": jnp.ones((batch, UNITS))}
  task = masks_task(kind)
  variables = task.init(KEY) if kind == "nnx" else Variables({}, {})
  assert names(variables) == set()  # random states are no variables

  @jax.jit
  def run(key):
    def lane(lane_key):
      def step(carry, i):
        loss = task.loss(variables, examples, jax.random.fold_in(lane_key, i))
        return carry, loss.value

      return jax.lax.scan(step, 0, jnp.arange(steps))[1]

    return jax.vmap(lane)(jax.random.split(key, lanes))

  numbers = np.asarray(run(KEY)).astype(np.int64).ravel()
  masks = (
    numbers.reshape(-1, 1, 1) >> np.arange(3 * UNITS).reshape(3, UNITS) & 1
  )
  assert masks.shape == (lanes * steps * batch, 3, UNITS)
  assert 0.4 < masks.mean() < 0.6
  # Of 24 masks of 7 bits chance makes about 22 distinct. Were one shared by
  # lanes, steps or examples, there would be 12 at most.
  for stream in range(3):
    assert len(np.unique(masks[:, stream], axis=0)) > 16
    same = np.all(masks[:, stream] == masks[:, stream - 1], axis=-1)
    assert same.mean() < 0.2
  np.testing.assert_array_equal(run(KEY), numbers.reshape(lanes, steps, batch))
  assert not np.any(np.ravel(run(jax.random.key(1))) == numbers)


# --- whole rounds -------------------------------------------------------------

SIZES = [3, 5, 2, 4, 6]


def running(name, variables, examples, batches):
  """(mean, var) of the batch norm after these batches, in float64."""
  base_, kernel, bias, _, _, mean, var, _, _ = layers(name, variables)
  for rows in batches:
    h = examples["x"][rows].astype(np.float64) @ (base_ + kernel) + bias
    mean = MOMENTUM * mean + (1 - MOMENTUM) * h.mean(0)
    var = MOMENTUM * var + (1 - MOMENTUM) * h.var(0)
  return mean, var


@pytest.mark.parametrize("net", slow_but(["nnx"], NETS))
def test_buffers_become_the_weighted_mean_over_clients(net):
  """Neither clipped, nor negated, nor optimized, nor weighted otherwise."""
  task = NETS[net]
  data = blobs(SIZES)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.0), optimizer("adam", learning_rate=0.1)),
    data,
    batching=LocalBatching(batch_size=4, shuffle=False, epochs=2),
    lanes=2,
    aggregator=aggregators.sum_(),
    transforms=[transforms.clip(1e-6)],
  )
  # A partial batch wraps around to the client's first examples.
  walks = {
    2: [[0, 1, 0, 1]],
    3: [[0, 1, 2, 0]],
    4: [[0, 1, 2, 3]],
    5: [[0, 1, 2, 3], [4, 0, 1, 2]],
    6: [[0, 1, 2, 3], [4, 5, 0, 1]],
  }
  state = simulator.init()
  for round_ in range(2):
    variables = state.server.variables
    clients = [
      running(net, variables, data.train.client(k), 2 * walks[size])
      for k, size in enumerate(SIZES)
    ]
    state = simulator.dispatch(state, simulator.plan(round_, 1)).state
    for i, expected in enumerate(zip(*clients, strict=True)):
      np.testing.assert_allclose(
        layers(net, state.server.variables)[5 + i],
        np.average(expected, axis=0, weights=SIZES),
        rtol=1e-4,
        atol=1e-5,
      )


def in_float64(task):
  double = lambda x: x.astype(jnp.float64)
  return task._replace(init=lambda key: jax.tree.map(double, task.init(key)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("net", "layout"),
  slow_but([("nnx", (2, 2))], [("nnx", (2, 2)), ("linen", (4, 1))]),
)
def test_a_run_with_all_of_it_depends_on_neither_lanes_nor_devices(net, layout):
  task = in_float64(NETS[net])  # in float32, batch norm magnifies rounding
  data = blobs(SIZES, dtype=np.float64)

  def variables_after(lanes, devices):
    simulator = make_simulator(
      task,
      fedavg(task, sgd(0.3), sgd(1.0)),
      data,
      clients_per_round=4,
      batching=LocalBatching(batch_size=2),
      lanes=lanes,
      devices=devices,
    )
    start = simulator.init().server.variables
    state = train(simulator, 3)
    return start, jax.device_get(state.server.variables)

  start, first = variables_after(1, 1)
  assert np.abs(flat(first.params) - flat(start.params)).max() > 0.05
  assert np.abs(flat(first.buffers) - flat(start.buffers)).max() > 0.05
  jax.tree.map(np.testing.assert_array_equal, first.frozen, start.frozen)
  _, other = variables_after(*layout)
  np.testing.assert_allclose(flat(other), flat(first), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_linen_without_buffers_modes_or_streams():
  x = jax.ShapeDtypeStruct((2, FEATURES), jnp.float32)
  task = linen_task(linen.Dense(CLASSES), x, streams=())
  variables = task.init(KEY)
  assert variables.buffers == {}
  examples = batch_of()
  p = variables.params
  logits = examples["x"] @ np.asarray(p["kernel"]) + np.asarray(p["bias"])
  nll = -jax.nn.log_softmax(logits)[np.arange(4), examples["y"]]
  loss = task.loss(variables, examples, KEY)
  np.testing.assert_allclose(loss.value, nll, rtol=1e-5)
  assert loss.buffers == {}
  train(
    make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), blobs([2, 3])), 1
  )


def test_own_loss_metrics_and_inputs():
  task = nnx_task(
    lambda rngs: nnx.Linear(2, 1, rngs=rngs),
    loss=lambda out, ex: ((out[:, 0] - ex["t"]) ** 2, ex["n"]),
    metrics=lambda out, ex: {"gap": Metric(out[:, 0] * ex["n"], ex["n"])},
    inputs=lambda ex: ex["left"] + ex["right"],
  )
  variables = task.init(KEY)
  examples = {
    "left": jnp.ones((3, 2)),
    "right": jnp.arange(6.0).reshape(3, 2),
    "t": jnp.array([1.0, 2.0, 3.0]),
    "n": jnp.array([1.0, 0.0, 5.0]),
  }
  kernel, bias = (np.asarray(variables.params[k]) for k in ("kernel", "bias"))
  out = (1 + np.arange(6.0).reshape(3, 2)) @ kernel + bias
  loss = task.loss(variables, examples, KEY)
  np.testing.assert_allclose(loss.value, (out[:, 0] - [1, 2, 3]) ** 2, 1e-5)
  np.testing.assert_array_equal(loss.weight, [1, 0, 5])
  gap = task.metrics(variables, examples)["gap"]
  np.testing.assert_allclose(gap.total, out[:, 0] * [1, 0, 5], 1e-5)


def test_function_task():
  task = function_task(
    lambda key: {"w": jax.random.normal(key, (2,))},
    lambda params, ex: jnp.square(ex["x"] @ params["w"]),
    lambda params, ex: {"positive": ex["x"] @ params["w"] > 0},
  )
  variables = task.init(KEY)
  np.testing.assert_array_equal(
    variables.params["w"], jax.random.normal(KEY, (2,))
  )
  assert variables.buffers == () == variables.frozen
  x = jnp.array([[1.0, 2.0], [-3.0, 1.0], [0.5, -0.5]])
  out = np.asarray(x) @ np.asarray(variables.params["w"])
  loss = task.loss(variables, {"x": x}, KEY)
  np.testing.assert_allclose(loss.value, out**2, rtol=1e-5)
  np.testing.assert_array_equal(loss.weight, np.ones(3))
  metrics = task.metrics(variables, {"x": x})
  assert set(metrics) == {"loss", "positive"}
  np.testing.assert_allclose(metrics["loss"].total, out**2, rtol=1e-5)
  np.testing.assert_array_equal(metrics["positive"].total, out > 0)
  assert set(
    function_task(task.init, lambda params, ex: ex["x"][:, 0]).metrics(
      variables, {"x": x}
    )
  ) == {"loss"}


# --- the masked mean ----------------------------------------------------------


def weighted_task():
  """Loss (w - x)^2, weight n, of an example (x, n)."""

  def loss(variables, examples, key):
    gap = variables.params - examples["x"]
    return Loss(gap**2, examples["n"])

  return Task(lambda key: Variables(jnp.zeros(())), loss, lambda v, e: {})


def value_and_gradient(x, n, mask, w=0.5):
  def value(w):
    batch = Batch(
      {"x": jnp.asarray(x, jnp.float32), "n": jnp.asarray(n, jnp.float32)},
      jnp.asarray(mask),
    )
    return core.mean_loss(weighted_task(), Variables(w), batch, KEY)

  return jax.jit(jax.value_and_grad(value, has_aux=True))(jnp.float32(w))


def test_mean_loss_weighs_and_masks():
  x, n = np.array([1.0, -2.0, 7.0, 3.0]), np.array([1.0, 4.0, 9.0, 0.0])
  mask = np.array([True, True, False, True])
  (mean, (buffers, metric)), gradient = value_and_gradient(x, n, mask)
  used = np.where(mask, n, 0)
  expected = (used * (0.5 - x) ** 2).sum() / used.sum()
  np.testing.assert_allclose(mean, expected, rtol=1e-6)
  np.testing.assert_allclose(
    gradient, (used * 2 * (0.5 - x)).sum() / used.sum(), rtol=1e-6
  )
  assert buffers == ()
  np.testing.assert_allclose(metric.total, expected * used.sum(), rtol=1e-6)
  assert metric.weight == used.sum() == 5


@pytest.mark.parametrize(
  ("n", "mask"), [([1.0, 1.0], [False, False]), ([0.0, 0.0], [True, True])]
)
def test_a_batch_without_weight_has_no_loss_and_no_gradient(n, mask):
  (mean, (_, metric)), gradient = value_and_gradient([1.0, 2.0], n, mask)
  assert mean == 0
  assert gradient == 0
  assert metric == (0, 0)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_masked_loss_that_is_not_finite_is_left_out(bad):
  x, n = [1.0, bad], [1.0, 1.0]
  (mean, (_, metric)), _ = value_and_gradient(x, n, [True, False])
  assert mean == 0.25
  assert metric == (0.25, 1)


def test_rows_that_fill_a_batch_bring_in_no_other_client():
  """They repeat the client's own examples: its neighbors' NaN stay away.

  A mask after the forward pass could not stop them: 0 times NaN is NaN in the
  gradient.
  """

  def loss(params, examples):  # finite, but its gradient is not, at x = 0
    return params["w"] * jnp.sqrt(jnp.abs(params["w"] * examples["x"][:, 0]))

  task = function_task(lambda key: {"w": jnp.ones(())}, loss)
  data = blobs([3, 2, 3], features=1)
  data.train.examples["x"][:] = 1
  data.train.examples["x"][3:5] = 0  # client 1
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0), weighting="uniform"),
    data,
    batching=LocalBatching(batch_size=2),
    lanes=3,
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  assert [list(ids) for _, ids in out.rejected] == [[1]]
  w = 1.0
  for _ in range(2):
    w -= 0.1 * 1.5 * np.sqrt(w)
  np.testing.assert_allclose(params_of(simulator, out.state)["w"], w, rtol=1e-5)


# --- precision and rematerialisation ------------------------------------------


def equations(jaxpr):
  """All equations, those of inner jaxprs included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for parameter in eqn.params.values():
      for inner in jax.tree.leaves(
        parameter, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
      ):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def dtypes_of(jaxpr, primitive):
  return {
    v.aval.dtype
    for eqn in equations(jaxpr)
    if eqn.primitive.name == primitive
    for v in eqn.invars
    if jnp.issubdtype(v.aval.dtype, jnp.floating)
  }


def mean_of(task, examples):
  """The mean loss of variables, and the same with its gradient."""
  batch = Batch(examples, jnp.array([True, True, True, False]))

  def mean(variables):
    return core.mean_loss(task, variables, batch, KEY)

  def both(variables):
    by_params = lambda params: mean(variables._replace(params=params))
    return jax.value_and_grad(by_params, has_aux=True)(variables.params)

  return mean, both


@pytest.mark.parametrize("net", NETS)
def test_compute_dtype_lowers_the_products_and_nothing_else(net):
  full, variables, examples = NETS[net], variables_of(net), batch_of()
  task = with_compute_dtype(full, jnp.bfloat16)
  mean, both = mean_of(task, examples)

  low, single = {np.dtype(jnp.bfloat16)}, {np.dtype("float32")}
  forward = jax.make_jaxpr(mean)(variables).jaxpr
  backward = jax.make_jaxpr(both)(variables).jaxpr
  evaluated = jax.make_jaxpr(task.metrics)(variables, examples).jaxpr
  assert dtypes_of(forward, "dot_general") == low
  assert dtypes_of(backward, "dot_general") == low
  assert dtypes_of(evaluated, "dot_general") == low
  assert dtypes_of(forward, "reduce_sum") == single
  assert dtypes_of(forward, "log") == single
  shapes = jax.eval_shape(
    lambda v: (both(v), task.metrics(v, examples), task.init(KEY)),
    variables,
  )
  assert {x.dtype for x in jax.tree.leaves(shapes)} == single

  (value, (buffers, _)), slope = jax.jit(both)(variables)
  (reference, (other_buffers, _)), exact = jax.jit(mean_of(full, examples)[1])(
    variables
  )
  np.testing.assert_allclose(value, reference, rtol=0.03)
  assert value != reference
  np.testing.assert_allclose(flat(buffers), flat(other_buffers), atol=0.03)
  error = np.linalg.norm(flat(slope) - flat(exact))
  error /= np.linalg.norm(flat(exact))
  assert 0 < error < 0.1


def test_a_run_in_bfloat16_keeps_float32_and_learns_the_same():
  data = blobs([6, 9, 4, 7])
  full = mlp((FEATURES,), CLASSES, (8,))

  def run(task):
    simulator = make_simulator(
      task, fedavg(task, sgd(0.1), sgd(1.0)), data, lanes=2
    )
    state = simulator.init()
    losses = []
    for out in simulator.run(state, 4):
      state = out.state
      losses += [row["train/loss"] for row in out.rows]
    params = params_of(simulator, state)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    return flat(params), losses

  params, losses = run(full)
  low_params, low_losses = run(with_compute_dtype(full, jnp.bfloat16))
  np.testing.assert_allclose(low_losses, losses, rtol=0.02)
  np.testing.assert_allclose(low_params, params, atol=0.02)
  assert not np.array_equal(low_params, params)


@pytest.mark.parametrize("net", NETS)
def test_logits_are_those_of_evaluation_whatever_is_around_the_task(net):
  full, variables, examples = NETS[net], variables_of(net), batch_of()
  of = lambda task: jax.jit(task.logits)(variables, examples)
  logits = of(full)
  assert logits.shape == (4, CLASSES)
  expected = full.metrics(variables, examples)["loss"].total
  value, _ = losses.cross_entropy(logits, examples)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  remade = of(with_remat(full))
  np.testing.assert_allclose(remade, logits, rtol=1e-5, atol=1e-6)
  lowered = of(with_compute_dtype(full, jnp.bfloat16))
  assert lowered.dtype == np.float32
  np.testing.assert_allclose(lowered, logits, rtol=0.05, atol=0.05)
  assert not np.array_equal(lowered, logits)


def test_a_task_without_logits_stays_one():
  task = function_task(lambda key: jnp.zeros(2), lambda params, e: e["x"])
  assert task.logits is None
  assert with_remat(task).logits is None
  assert with_compute_dtype(task, jnp.float16).logits is None


@pytest.mark.parametrize("net", NETS)
def test_remat_gives_the_same_and_recomputes(net):
  full, variables, examples = NETS[net], variables_of(net), batch_of()
  plain = mean_of(full, examples)[1]
  remade = mean_of(with_remat(full), examples)[1]
  np.testing.assert_allclose(
    flat(jax.jit(remade)(variables)),
    flat(jax.jit(plain)(variables)),
    rtol=1e-5,
    atol=1e-6,
  )
  primitives = lambda f: {
    e.primitive.name for e in equations(jax.make_jaxpr(f)(variables).jaxpr)
  }
  rematerialised = primitives(remade) - primitives(plain)
  assert rematerialised & {"remat", "remat2", "checkpoint"}


@pytest.mark.slow
def test_remat_and_compute_dtype_together_in_a_round():
  data = blobs([3, 4, 2])
  task = with_remat(with_compute_dtype(NETS["nnx"], jnp.bfloat16))
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, lanes=3
  )
  start = simulator.init().server.variables
  after = train(simulator, 2).server.variables
  assert np.isfinite(flat(after)).all()
  assert np.abs(flat(after.params) - flat(start.params)).max() > 1e-3
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(after) == shapes(start)


def test_cross_entropy_is_at_least_float32():
  logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
  y = np.array([1, 0])
  nll = np.log(np.exp(logits).sum(1)) - logits[[0, 1], y]
  value, weight = losses.cross_entropy(
    jnp.asarray(logits, jnp.bfloat16), {"y": jnp.asarray(y)}
  )
  assert value.dtype == weight.dtype == jnp.float32
  np.testing.assert_allclose(value, nll, rtol=1e-6)


# --- further metrics ----------------------------------------------------------


def surety(logits, examples):
  """The largest probability, (batch,)."""
  return jnp.max(jax.nn.softmax(logits), axis=1)


def hits_in_the_first_class(logits, examples):
  first = (examples["y"] == 0).astype(jnp.float32)
  return Metric((jnp.argmax(logits, axis=1) == 0) * first, first)


A_LONG_NAME = "a" * 100


def is_sure(logits, examples):
  return jnp.max(logits, axis=1) > 0  # bools


is_sure.__name__ = A_LONG_NAME
is_sure.higher_is_better = False  # type: ignore[attr-defined]
FURTHER = [surety, hits_in_the_first_class, is_sure]


@pytest.mark.parametrize(("lanes", "devices"), [(1, 1), (3, 2)])
def test_further_metrics_are_numpys_for_every_client(lanes, devices):
  data = blobs([5, 9, 2, 7, 1])
  data = dataclasses.replace(data, unseen=data.train)
  task = with_metrics(mlp((6,), 3, (8,)), FURTHER)
  algorithm = fedavg(task, sgd(0.1), sgd(1.0))
  simulator = make_simulator(
    task, algorithm, data, lanes=lanes, devices=devices
  )
  state = train(simulator, 2)
  found = simulator.evaluate.clients(state, "unseen").per_client()
  examples = data.train.examples
  variables = algorithm.variables(state.server)
  assert task.logits is not None
  logits = np.asarray(jax.jit(task.logits)(variables, examples), np.float64)
  likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  for i in range(5):
    rows = slice(*data.train.offsets[i : i + 2])
    expected = likely[rows].max(axis=1).mean()
    np.testing.assert_allclose(found["surety"][i], expected, rtol=1e-5)
    expected = np.mean(logits[rows].max(axis=1) > 0)
    np.testing.assert_allclose(found[A_LONG_NAME][i], expected, rtol=1e-6)
    first = logits[rows][examples["y"][rows] == 0]
    expected = np.mean(first.argmax(1) == 0) if len(first) else np.nan
    np.testing.assert_allclose(found["hits_in_the_first_class"][i], expected)
  summary = simulator.evaluate(state)
  np.testing.assert_allclose(
    summary["unseen/surety"], likely.max(axis=1).mean(), rtol=1e-5
  )
  assert f"unseen/{A_LONG_NAME}/p10" in summary


@pytest.mark.parametrize(
  "change",
  [
    with_remat,
    functools.partial(with_compute_dtype, dtype=jnp.bfloat16),
    functools.partial(with_frozen, patterns=("layers/0/kernel",)),
  ],
)
def test_changed_tasks_keep_further_metrics_and_directions(change):
  full = mlp((6,), 3, (8,))
  better = {"loss": False, "accuracy": True, A_LONG_NAME: False}
  examples = {"x": jnp.ones((4, 6)), "y": jnp.zeros(4, jnp.int32)}
  inside = change(with_metrics(full, FURTHER))
  outside = with_metrics(change(full), FURTHER)
  for task in (inside, outside):
    assert dict(task.higher_is_better) == better
    variables = jax.eval_shape(task.init, jax.random.key(0))
    metrics = jax.eval_shape(task.metrics, variables, examples)
    assert metrics.keys() == {"loss", "accuracy"} | {
      f.__name__ for f in FURTHER
    }
    assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


def test_directions_by_default():
  task = mlp((6,), 3)
  assert task.higher_is_better == {"loss": False, "accuracy": True}
  with_metrics(task, FURTHER)
  assert task.higher_is_better == {"loss": False, "accuracy": True}


def check_metric_refused(function, match):
  task = with_metrics(mlp((6,), 3), [function])
  data = blobs([5, 5])
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  with pytest.raises(ModelError, match=match) as caught:
    _ = simulator.checked
  assert str(caught.value).startswith("model.metrics: ")
  assert isinstance(caught.value.__cause__, MetricError)


def test_metrics_that_cannot_be():
  def mean(logits, examples):
    return jnp.mean(logits)

  def text(logits, examples):
    return "high"

  def missing(logits, examples):
    return examples["z"]

  def accuracy(logits, examples):
    return logits[:, 0]

  def client(logits, examples):
    return logits[:, 0]

  def lopsided(logits, examples):
    return Metric(logits[:, 0], jnp.ones(()))

  check_metric_refused(mean, r"'mean' has shape \(\); give one number an exam")
  check_metric_refused(text, "'text': TypeError: ")
  check_metric_refused(missing, r"'missing': line \d+: KeyError: z")
  check_metric_refused(accuracy, "the name 'accuracy' is taken")
  check_metric_refused(client, "the name 'client' is taken")
  check_metric_refused(lopsided, r"'lopsided' has shape \(\)")


def test_functions_that_are_no_metrics():
  task = mlp((6,), 3)
  with pytest.raises(TypeError, match="lambda.* has no name"):
    with_metrics(task, [lambda logits, examples: logits[:, 0]])
  with pytest.raises(ValueError, match="two named 'surety'"):
    with_metrics(task, [surety, surety])

  def upwards(logits, examples):
    return logits[:, 0]

  upwards.higher_is_better = "yes"  # type: ignore[attr-defined]
  with pytest.raises(TypeError, match=r"upwards\.higher_is_better='yes'"):
    with_metrics(task, [upwards])
  plain = function_task(lambda key: {}, lambda params, examples: examples["x"])
  with pytest.raises(ValueError, match=r"model\.metrics needs .* logits"):
    with_metrics(plain, [surety])
