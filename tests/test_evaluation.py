"""Evaluation against numpy, client by client."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.algorithms.ditto import ditto
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Loss, Metric, Task, Variables
from fedjax_sim.data import FederatedData, open_store, write_store
from fedjax_sim.engine import evaluation_pieces, residency
from fedjax_sim.engine.batching import LocalBatching, evaluation_batch
from fedjax_sim.engine.client_metrics import ClientMetrics, over_clients
from fedjax_sim.engine.evaluation import EvaluationSet, as_blocks
from fedjax_sim.engine.evaluation_pieces import in_pieces
from problems import MODELS, blobs, make_simulator, sgd, train
from tiers import slow_but

SEEN = [3, 0, 5, 1, 9, 0]
UNSEEN = [2, 7, 4]
BATCH = 4


def part_of(sizes, seed):
  """More clients with the blobs of `blobs`, of these sizes."""
  drawn = blobs([max(1, sum(sizes))], seed=seed).train.examples
  return FederatedData(
    examples={k: v[: sum(sizes)] for k, v in drawn.items()},
    offsets=np.append(0, np.cumsum(sizes)),
    allow_empty=True,
  )


def dataset(test_size=11):
  return dataclasses.replace(
    blobs([4, 2, 6, 3, 5, 2]),
    seen=part_of(SEEN, 1),
    unseen=part_of(UNSEEN, 2),
    test=dict(part_of([test_size], 3).examples),
  )


def simulator_of(algorithm, task, data, lanes=1, devices=1):
  simulator = make_simulator(
    task, algorithm, data, lanes=lanes, devices=devices
  )
  runtime = dataclasses.replace(simulator.runtime, eval_batch_size=BATCH)
  return dataclasses.replace(simulator, runtime=runtime)


def random_params(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
  )


def in_numpy(params, examples):
  """(loss, hit) of each example under logistic regression, float64."""
  bias, kernel = (np.asarray(x, np.float64) for x in jax.tree.leaves(params))
  logits = np.asarray(examples["x"], np.float64) @ kernel + bias
  y = examples["y"]
  top = logits.max(1)
  norm = np.log(np.exp(logits - top[:, None]).sum(1)) + top
  return norm - logits[np.arange(len(y)), y], logits.argmax(1) == y


def check_clients(metrics, data, params_by_client):
  """The metrics of every client of `data`, NaN for those without examples."""
  per_client = metrics.per_client()
  for name, which in (("loss", 0), ("accuracy", 1)):
    expected = [
      in_numpy(params_by_client[k], data.client(k))[which].mean()
      if data.sizes[k]
      else np.nan
      for k in range(data.num_clients)
    ]
    np.testing.assert_allclose(per_client[name], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(metrics.weight["loss"], data.sizes)


@pytest.mark.parametrize(
  ("lanes", "devices", "test_size"),
  slow_but([(2, 2, 3)], [(1, 1, 11), (6, 1, 12), (2, 2, 3)]),
)
def test_metrics_are_numpys_whatever_lanes_devices_and_sizes(
  lanes, devices, test_size
):
  data = dataset(test_size)
  task = MODELS["lr"](data)
  simulator = simulator_of(
    fedavg(task, sgd(0.1), sgd(1.0)), task, data, lanes, devices
  )
  state = simulator.init()
  server = state.server
  params = random_params(server.variables.params, 0)
  variables = server.variables._replace(params=params)
  state = simulator.states.to_devices(
    state._replace(server=server._replace(variables=variables))
  )

  row = simulator.evaluate(state)
  loss, hit = in_numpy(params, data.test)
  assert row["test/loss"] == pytest.approx(loss.mean(), rel=1e-5)
  assert row["test/accuracy"] == pytest.approx(hit.mean(), rel=1e-6)
  assert 0 < hit.mean() <= 1
  for name, part in (("seen", data.seen), ("unseen", data.unseen)):
    same = [params] * part.num_clients
    check_clients(simulator.evaluate.clients(state, name), part, same)
    loss, hit = in_numpy(params, part.examples)
    assert row[f"{name}/loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert row[f"{name}/accuracy"] == pytest.approx(hit.mean(), rel=1e-6)
    owner = np.repeat(np.arange(part.num_clients), part.sizes)
    means = [loss[owner == k].mean() for k in np.unique(owner)]
    assert row[f"{name}/loss/mean"] == pytest.approx(np.mean(means), rel=1e-5)
    for q in (10, 50, 90):
      assert row[f"{name}/loss/p{q}"] == pytest.approx(
        np.percentile(means, q), rel=1e-5
      )
  assert all(np.isfinite(v) for v in row.values())


def test_personal_models_are_evaluated_on_their_own_clients():
  data = dataset()
  task = MODELS["lr"](data)
  simulator = simulator_of(ditto(task, sgd(0.3), sgd(1.0)), task, data, lanes=3)
  state = train(simulator, 2)
  params = state.server.variables.params
  table = state.clients[0].params
  own = [jax.tree.map(lambda x, k=k: x[k], table) for k in range(len(SEEN))]

  seen = simulator.evaluate.clients(state, "seen")
  check_clients(seen, data.seen, own)
  globally = in_numpy(params, data.seen.client(4))[0].mean()
  assert abs(seen.per_client()["loss"][4] - globally) > 0.01
  check_clients(
    simulator.evaluate.clients(state, "unseen"), data.unseen, [params] * 3
  )
  row = simulator.evaluate(state)
  loss, _ = in_numpy(params, data.test)
  assert row["test/loss"] == pytest.approx(loss.mean(), rel=1e-5)


@pytest.mark.parametrize(
  ("devices", "room", "pieces"),
  [
    (1, 1, [3, 4, 12]),  # bytes a set; a client at a time
    pytest.param(1, 700, [1, 1, 3], marks=pytest.mark.slow),
    pytest.param(2, 420, [1, 1, 5], marks=pytest.mark.slow),
  ],
)
def test_what_has_no_room_on_the_devices_is_sent_in_pieces(
  tmp_path, monkeypatch, room, pieces, devices
):
  data = dataclasses.replace(dataset(), unseen=part_of([1, 2, 3, 4] * 3, 4))
  task = MODELS["lr"](data)
  algorithm = ditto(task, sgd(0.3), sgd(1.0))
  whole = simulator_of(algorithm, task, data, 2, devices)
  state = train(whole, 2)
  expected = whole.evaluate(state)
  assert all(len(s.pieces) == 1 for s in whole.evaluate.sets.values())
  write_store(tmp_path / "s", data)
  monkeypatch.setattr(residency, "device_room", lambda mesh: 3 * room)
  for held in (data, open_store(tmp_path / "s")):
    parts = simulator_of(algorithm, task, held, 2, devices)
    sets = parts.evaluate.sets.values()
    assert parts.evaluate(state) == expected
    assert parts.evaluate(state) == expected
    assert [len(s.pieces) for s in sets] == pieces
    assert [s._jitted._cache_size() for s in sets] == [1, 1, 1]


@settings(max_examples=200, deadline=None)
@given(
  sizes=st.lists(st.integers(0, 12), min_size=1, max_size=60).filter(any),
  large=st.integers(0, 300),
  devices=st.integers(1, 9),
  lanes=st.integers(1, 9),
  most=st.floats(0, 400),
)
def test_pieces_have_every_client_once_and_room(
  sizes, large, devices, lanes, most
):
  sizes = np.array([*sizes, large])
  data = FederatedData(
    examples={"x": np.zeros(sizes.sum(), np.uint8)},
    offsets=np.append(0, np.cumsum(sizes)),
    allow_empty=True,
  )
  batching = LocalBatching(batch_size=BATCH, shuffle=False).fitted(sizes)
  pieces, shape = in_pieces(data, batching, most, lanes=lanes, devices=devices)
  np.testing.assert_array_equal(np.concatenate(pieces), np.flatnonzero(sizes))
  (held,) = shape.examples
  if len(pieces) == 1:
    assert held <= most or (sizes > 0).sum() == 1
  else:
    assert held <= max(most / 2, sizes.max())
    # Two neighbors are one piece where all devices together have no room.
    pairs = itertools.pairwise([int(sizes[ids].sum()) for ids in pieces])
    assert all(one + other > most / 2 for one, other in pairs)
  for ids in pieces:
    plan, slices = evaluation_pieces.planned(data, batching, ids, shape)
    assert sorted(plan.client[plan.client >= 0]) == ids.tolist()
    assert slices.place.max() < held
    assert sorted(slices.row) == [
      row for i in ids for row in range(*data.offsets[i : i + 2])
    ]


def test_a_large_client_does_not_make_pieces_small():
  sizes = np.array([10_000] + [5] * 5_000)
  ids = np.arange(len(sizes))
  cut = evaluation_pieces._cut(sizes, ids, 15_000, 16, 1)
  assert [int(sizes[i].sum()) for i in cut] == [15_000, 15_000, 5_000]


def test_examples_count_by_their_weight():
  data = dataset()

  def metrics(variables, examples):
    n = examples["y"].astype(jnp.float32)  # the classes 0, 1 and 2
    return {"x": Metric(examples["x"][:, 0] * n, n)}

  def loss(variables, examples, key):
    zeros = jnp.zeros(len(examples["y"]))  # nothing is trained
    return Loss(zeros, zeros)

  task = Task(lambda key: Variables(jnp.zeros(1)), loss, metrics)
  algorithm = fedavg(task, sgd(0.1), sgd(1.0))
  simulator = make_simulator(task, algorithm, data)
  part = EvaluationSet(
    task, algorithm, data.seen, mesh=simulator.mesh, lanes=2, batch_size=BATCH
  )
  out = part(simulator.init())
  x, y = data.seen.examples["x"][:, 0], data.seen.examples["y"]
  owner = np.repeat(np.arange(len(SEEN)), SEEN)
  weight = np.bincount(owner, y, len(SEEN))
  assert weight[3] == 0 < SEEN[3]  # a client whose examples weigh nothing
  total = np.bincount(owner, x * y, len(SEEN))
  np.testing.assert_array_equal(out.weight["x"], weight)
  with np.errstate(invalid="ignore"):
    np.testing.assert_allclose(out.per_client()["x"], total / weight, rtol=1e-5)
  assert out.overall()["x"] == pytest.approx(np.average(x, weights=y), rel=1e-5)


def test_the_summary_leaves_out_clients_without_examples():
  metrics = ClientMetrics(
    total={"a": np.array([1.0, 0.0, 6.0, 5.0])},
    weight={"a": np.array([1.0, 0.0, 2.0, 10.0])},
  )
  np.testing.assert_array_equal(metrics.per_client()["a"], [1, np.nan, 3, 0.5])
  assert metrics.summary("seen") == {
    "seen/a": pytest.approx(12 / 13),
    "seen/a/mean": pytest.approx(1.5),
    "seen/a/p10": pytest.approx(0.6),
    "seen/a/p50": pytest.approx(1.0),
    "seen/a/p90": pytest.approx(2.6),
    "seen/a/lowest10": 0.5,
    "seen/a/highest10": 3.0,
    "seen/a/std": pytest.approx(np.std([1, 3, 0.5])),
    "seen/a/gini": pytest.approx(5 / 13.5),  # pairs' differences / 2 n^2 mean
  }


@given(
  st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=40)
)
def test_statistics_over_clients(values):
  x = np.array(values)
  found = over_clients(x)
  pairs = np.abs(x[:, None] - x).sum()
  expected = pairs / (2 * len(x) ** 2 * x.mean()) if x.sum() else 0
  assert found["gini"] == pytest.approx(expected, abs=1e-9)
  tenth = math.ceil(len(x) / 10)
  assert found["lowest10"] == pytest.approx(np.sort(x)[:tenth].mean())
  assert found["highest10"] == pytest.approx(np.sort(x)[::-1][:tenth].mean())
  assert np.isnan(over_clients(x - 20)["gini"])


def test_a_client_whose_number_is_nan_does_not_hide():
  found = over_clients(np.array([1.0, np.nan, 2.0]))
  assert all(np.isnan(v) for v in found.values())


def test_a_client_whose_loss_is_infinite_is_no_warning():
  found = over_clients(np.array([1.0, np.inf, 2.0]))
  assert found["lowest10"] == 1.0
  assert found["mean"] == found["highest10"] == np.inf
  assert np.isnan(found["std"])
  assert np.isnan(found["gini"])


def test_a_mean_of_nan_does_not_hide():
  """A client whose loss is NaN is not a client without examples."""
  metrics = ClientMetrics(
    total={"a": np.array([1.0, np.nan])}, weight={"a": np.ones(2)}
  )
  assert np.isnan(metrics.summary("seen")["seen/a/mean"])


def test_the_summary_of_nothing_is_nan():
  nothing = ClientMetrics(total={"a": np.zeros(2)}, weight={"a": np.zeros(2)})
  row = nothing.summary("seen")
  assert len(row) == 9
  assert all(np.isnan(v) for v in row.values())


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_blocks_hold_all_examples_in_order(count):
  examples = {"x": np.arange(count)[:, None], "y": np.arange(count)}
  blocks = as_blocks(examples, 4)
  sizes = blocks.sizes
  assert np.all(sizes[:-1] == 4)
  assert 1 <= sizes[-1] <= 4
  np.testing.assert_array_equal(blocks.examples["y"], np.arange(count))


def test_a_set_without_examples_is_refused():
  with pytest.raises(ValueError, match="seen has no examples"):
    dataclasses.replace(dataset(), seen=part_of([0] * 6, 1))


@given(
  st.lists(st.integers(0, 300), min_size=1, max_size=50),
  st.integers(1, 256),
  st.sampled_from([1, 16, 4096]),
)
def test_the_batch_is_the_cheapest(sizes, most, overhead):
  sizes = np.array(sizes)
  largest = max(1, min(most, sizes.max()))
  chosen = evaluation_batch(sizes, most, overhead)
  costs = {
    size: sum(-(-n // size) for n in sizes) * (size + overhead)
    for size in [largest, *(2**i for i in range(9) if 2**i < largest)]
  }
  assert costs[chosen] == min(costs.values())
