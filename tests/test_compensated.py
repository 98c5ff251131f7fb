"""Sums are right whatever the dtype of a model, and beyond 2^24."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import core
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedsgd import fedsgd
from fedjax_sim.core import (
  Batch,
  Loss,
  Metric,
  Report,
  Task,
  Variables,
  compensated,
)
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine import client_log
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.tasks import function_task
from problems import make_simulator, params_of, sgd, train

U = 2.0**-24  # half the distance from 1 to the next number of float32


def nothing(variables, examples, key):
  return Loss(jnp.zeros(0), jnp.zeros(0))


def exact(total):
  value, lost = compensated.parts(total)
  return np.asarray(value, np.float64) + np.asarray(lost, np.float64)


def test_a_sum_of_nothing_stays_one():
  total = compensated.add(compensated.zeros({}), {})
  assert compensated.parts(total) == ({}, {})


@jax.jit
def summed(first, terms):
  """The terms added to the first number, one after the other, in lanes."""

  def lane(first, terms):
    start = compensated.add(compensated.zeros(first), first)
    add = lambda i, total: compensated.add(total, terms[i])
    return jax.lax.fori_loop(0, len(terms), add, start)

  return jax.vmap(lane)(first, terms)


def test_running_sums_count_on_and_keep_to_their_bound():
  rng = np.random.default_rng(0)
  terms = np.ones((4, 1000), np.float32)
  terms[1] = 1e6 * rng.normal(size=1000)
  terms[2] = rng.random(1000)
  terms[3, 500] = np.inf
  first = np.array([2**24, 1e-3, 2**30, 0], np.float32)
  total = summed(first, terms)
  for i in range(3):
    every = [float(first[i]), *map(float, terms[i])]
    found = exact(total)[i]
    bound = 2 * U**2 * len(every) * math.fsum(map(abs, every))
    assert abs(found - math.fsum(every)) <= bound + 2**-50
  assert exact(total)[0] == 2**24 + 1000
  assert float(compensated.rounded(total)[0]) == 2**24 + 1000
  assert np.float32(2**24) + np.float32(1) == 2**24  # what float32 does
  assert compensated.rounded(total)[3] == np.inf


@pytest.mark.parametrize(("backend", "count"), [("cpu", 1), ("gpu", 2 * 4)])
def test_scalars_of_several_dtypes_and_arrays_are_summed_side_by_side(
  monkeypatch, backend, count
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  term = {
    "a": jnp.bfloat16(0.5),
    "b": (jnp.arange(6.0).reshape(2, 3), jnp.int32(7)),
    "c": jnp.arange(4.0),
    "d": jnp.float32(0.25),
    "e": np.float16(2),
  }

  def once(total, _):
    return compensated.add(total, term), None

  total, _ = jax.lax.scan(once, compensated.zeros(term), None, length=8)
  summed = compensated.rounded(total)
  expected = jax.tree.map(lambda x: 8 * np.asarray(x, np.float32), term)
  jax.tree.map(np.testing.assert_array_equal, summed, expected)
  assert {x.dtype for x in jax.tree.leaves(summed)} == {np.dtype("float32")}
  # On a CPU the scalars are one array.
  assert len(jax.tree.leaves(total)) == count + 2 * 2


# --- a batch ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("dtype", "value"),
  [("int32", 31_360_000), ("bfloat16", 100), ("float16", 60_000), ("bool", 1)],
)
def test_metrics_of_a_batch_are_summed_in_float32(dtype, value):
  def metrics(variables, examples):
    values = jnp.full(512, value, dtype)
    return {"it": Metric(values, jnp.ones_like(values))}

  task = Task(lambda key: Variables(()), nothing, metrics)
  batch = Batch({}, jnp.arange(512) < 500)
  summed = jax.jit(lambda: core.sum_metrics(task, Variables(()), batch))()
  exact = 500 * float(np.asarray(value, jnp.dtype(dtype)))
  np.testing.assert_allclose(summed["it"].total, exact, rtol=512 * U)
  assert summed["it"].weight == 500
  assert {x.dtype for x in summed["it"]} == {np.dtype("float32")}


@pytest.mark.parametrize(
  ("dtype", "value"), [("bfloat16", 100), ("float16", 6e4)]
)
def test_the_loss_of_a_batch_is_summed_in_float32(dtype, value):
  def loss(variables, examples, key):
    values = variables.params * jnp.ones(512, dtype)
    return Loss(values, jnp.ones_like(values))

  task = Task(lambda key: Variables(()), loss, lambda v, e: {})

  @jax.jit
  @jax.value_and_grad
  def mean(w):
    batch = Batch({}, jnp.ones(512, bool))
    return core.mean_loss(task, Variables(w), batch, jax.random.key(0))[0]

  w = jnp.asarray(value, dtype)
  found, slope = mean(w)
  assert found.dtype == np.float32
  assert slope.dtype == w.dtype
  np.testing.assert_allclose(found, float(w), rtol=512 * U)
  np.testing.assert_allclose(slope, 1, rtol=1e-2)


# --- a client and a round -----------------------------------------------------


def data_of(sizes, **fields):
  offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
  train = FederatedData(examples=fields, offsets=offsets)
  return FederatedDataset(
    name="numbers", train=train, num_classes=0, example_shape=()
  )


@pytest.mark.parametrize(
  ("factor", "told"), [(1, 6e4), (2, np.inf)], ids=["sum", "value"]
)
def test_a_client_with_a_finite_update_stays_whatever_its_loss(factor, told):
  """A sum of losses that float16 does not hold, or a loss that is infinite."""
  task = function_task(
    lambda key: {"w": jnp.zeros((), jnp.float16)},
    lambda params, e: params["w"] + e["a"] * e["b"],
  )
  a = np.full(8, factor, np.float16)
  b = np.full(8, 6e4, np.float16)
  simulator = make_simulator(
    task, fedavg(task, sgd(0.5), sgd(1.0)), data_of([4, 4], a=a, b=b)
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  assert out.rows[0]["clients"] == 2
  assert out.rows[0]["clients_rejected"] == 0
  np.testing.assert_allclose(out.rows[0]["train/loss"], told, rtol=1e-3)
  assert params_of(simulator, out.state)["w"] == -0.5


def weighted_task():
  """Loss w + v of weight n, and the same as a metric."""

  def values(variables, examples):
    return variables.params["w"] + examples["v"]

  def loss(variables, examples, key):
    return Loss(values(variables, examples), examples["n"])

  def metrics(variables, examples):
    n = examples["n"]
    return {"loss": Metric(n * values(variables, examples), n)}

  start = lambda key: Variables({"w": jnp.zeros(())})
  return Task(start, loss, metrics)


def test_counts_beyond_float32_over_batches_and_clients():
  """2^24 tokens of one client, and single ones of 64 others."""
  sizes = [2] + [1] * 64
  n = np.ones(66, np.float32)
  n[:2] = 2**23
  v = np.ones(66, np.float32)
  v[:2] = 0
  data = data_of(sizes, n=n, v=v)
  task = weighted_task()
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.0), sgd(1.0)),
    data,
    batching=LocalBatching(batch_size=1, shuffle=False),
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  mean = 64 / (2**24 + 64)
  np.testing.assert_allclose(out.rows[0]["train/loss"], mean, rtol=4 * U)


def test_a_huge_evaluation_set_is_counted_exactly():
  """One client: 2^24 tokens, then 99 examples of a single one."""
  n = np.ones(100, np.float32)
  n[0] = 2**24
  v = np.full(100, 3, np.float32)
  v[0] = 1
  data = data_of([100], n=n, v=v)
  data = dataclasses.replace(data, unseen=data.train)
  task = weighted_task()
  simulator = make_simulator(task, fedavg(task, sgd(0.0), sgd(1.0)), data)
  runtime = dataclasses.replace(simulator.runtime, eval_batch_size=1)
  simulator = dataclasses.replace(simulator, runtime=runtime)
  found = simulator.evaluate.clients(simulator.init(), "unseen")
  assert found.weight["loss"].tolist() == [2**24 + 99]
  assert found.total["loss"].tolist() == [2**24 + 3 * 99]


def test_a_full_gradient_is_summed_in_float32():
  """1,000 gradients of 1: bfloat16 counts to 256."""
  task = function_task(
    lambda key: {"w": jnp.zeros((), jnp.bfloat16)},
    lambda params, e: params["w"] * e["a"],
  )
  simulator = make_simulator(
    task,
    fedsgd(task, sgd(1.0)),
    data_of([1000], a=np.ones(1000, np.float32)),
    batching=LocalBatching(batch_size=1),
  )
  assert params_of(simulator, train(simulator, 1))["w"] == -1


def test_the_log_of_clients_divides_in_float32():
  third = Metric(jnp.bfloat16(1), jnp.bfloat16(3))
  report = Report({"w": jnp.ones(2)}, jnp.ones(()), metrics={"third": third})
  columns = client_log.entry(report, report.update).columns
  np.testing.assert_allclose(columns["third"], 1 / 3, rtol=U)
