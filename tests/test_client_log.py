"""What is told of clients one by one, against numpy in float64."""

import dataclasses
import itertools
import pathlib
import sys

import jax
import numpy as np
import pytest

from fedjax_sim import aggregators, sampling, transforms
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import build, flags
from fedjax_sim.core import Requirements
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_log import combine
from fedjax_sim.training.stale import stale
from problems import MODELS, blobs, make_simulator, quadratic, sgd
from tiers import slow_but

DIGITS = pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py"

# From parameters of 0, client k's update is CENTRES[k], and its weight is
# SIZES[k]. That of client 3 is 0, and that of client 5 is not finite.
CENTRES = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
CENTRES[3] = 0
CENTRES[5] = 1e30
CURVATURES = np.array([1, 1, 1, 1, 1, 1e30], np.float32)
SIZES = np.array([3, 1, 4, 2, 5, 1])


def copies():
  train = FederatedData(
    examples={
      "x": np.repeat(CENTRES, SIZES, axis=0),
      "a": np.repeat(CURVATURES, SIZES),
    },
    offsets=np.append(0, np.cumsum(SIZES)),
  )
  return FederatedDataset(
    name="copies", train=train, num_classes=0, example_shape=(7,)
  )


def cohorts(*ids):
  """A sampler of these cohorts."""
  return sampling.Sampler(
    sample=lambda seed, round_: np.array(ids[round_], np.int64),
    sizes=(6,),
    expected=6.0,
  )


def algorithm_of(name):
  task = quadratic(7)
  algorithm = fedavg(task, sgd(1.0), sgd(1.0))
  if name != "stack":
    return algorithm

  def apply(server, aggregate, context):
    update = combine(aggregate.update, aggregate.members.weight)
    return algorithm.apply(server, aggregate._replace(update=update), context)

  return algorithm._replace(
    apply=apply, requirements=Requirements(all_updates=True)
  )


def logged(simulator, rounds=1, **runtime):
  """The log of all dispatches, and the simulator."""
  simulator = dataclasses.replace(
    simulator,
    log_clients=True,
    runtime=dataclasses.replace(simulator.runtime, **runtime),
  )
  logs = [out.client_log for out in simulator.run(simulator.init(), rounds)]
  assert simulator.compilations == 1
  return {k: np.concatenate([log[k] for log in logs]) for k in logs[0]}


def assert_same(a, b, **near):
  assert list(a) == list(b)
  for name in a:
    assert a[name].dtype == b[name].dtype
    if near:
      np.testing.assert_allclose(a[name], b[name], err_msg=name, **near)
    else:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
KINDS = ("weighted_mean", "mean", "sum", "median", "stack")
QUICK = [
  *zip(KINDS, itertools.cycle(LAYOUTS), strict=False),
  ("weighted_mean", (2, 2)),
]


@pytest.mark.parametrize(
  ("name", "layout"),
  slow_but(QUICK, itertools.product(aggregators.AGGREGATORS, LAYOUTS)),
)
def test_numbers_are_those_of_numpy(name, layout):
  lanes, devices = layout
  simulator = make_simulator(
    quadratic(7),
    algorithm_of(name),
    copies(),
    batching=LocalBatching(batch_size=8),
    lanes=lanes,
    devices=devices,
    aggregator=aggregators.AGGREGATORS[name](),
    sampler=cohorts([5, 3, 0, 1, 4]),
  )
  found = logged(simulator)
  assert list(found)[:4] == ["round", "client", "present", "weight"]
  np.testing.assert_array_equal(found["round"], [1] * 5)
  ids = [0, 1, 3, 4, 5]
  np.testing.assert_array_equal(found["client"], ids)
  np.testing.assert_array_equal(found["present"], [1, 1, 1, 1, 0])
  u = CENTRES[ids[:4]].astype(np.float64)
  mean = np.average(u, axis=0, weights=SIZES[ids[:4]])
  norm = np.linalg.norm(u, axis=1)
  with np.errstate(invalid="ignore"):
    cosine = u @ mean / (norm * np.linalg.norm(mean))
  expected = {
    "weight": SIZES[ids[:4]],
    "loss": 0.5 * (u**2).sum(1),
    "update/norm": norm,
    "update/mean": u.mean(1),
    "update/variance": u.var(1),
    "update/cosine": cosine,
  }
  assert expected.keys() == set(found) - {"round", "client", "present"}
  assert np.isnan(cosine[2])  # of the update that is 0
  for column, values in expected.items():
    np.testing.assert_allclose(
      found[column], [*values, np.nan], rtol=2e-6, atol=1e-7, err_msg=column
    )


def test_numbers_are_of_the_transformed_update_and_not_of_what_is_late():
  algorithm = stale(algorithm_of("weighted_mean"), 0.5)
  simulator = make_simulator(
    quadratic(7),
    algorithm,
    copies(),
    batching=LocalBatching(batch_size=8),
    transforms=[transforms.clip(0.5)],
    sampler=cohorts([0, 1, 2]),
  )
  found = logged(simulator)
  u = CENTRES[:3].astype(np.float64)
  u *= 0.5 / np.linalg.norm(u, axis=1, keepdims=True)
  mean = np.average(u, axis=0, weights=SIZES[:3])
  np.testing.assert_allclose(found["update/norm"], [0.5] * 3, rtol=5e-6)
  np.testing.assert_allclose(
    found["update/cosine"], u @ mean / (0.5 * np.linalg.norm(mean)), rtol=2e-6
  )


def digits_like(**changes):
  data = blobs([9, 5, 12, 7, 3, 8])
  task = MODELS["mlp"](data)
  options = {"clients_per_round": 4, "rounds_per_dispatch": 2} | changes
  return make_simulator(task, dga(task, sgd(0.1), sgd(1.0)), data, **options)


def test_values_are_told_by_their_names():
  """DGA's are of the update before transforms, of which there are none."""
  found = logged(digits_like(), 3)
  assert len(found["round"]) == 12
  for ours, theirs in {
    "value/norm": found["update/norm"],
    "value/variance": found["update/variance"],
    "value/mean": -found["update/mean"],
    "value/loss": found["loss"],
  }.items():
    np.testing.assert_allclose(found[ours], theirs, rtol=1e-6, err_msg=ours)


@pytest.mark.parametrize("lanes", slow_but([3], [1, 3]))
def test_two_devices_tell_what_one_does(lanes):
  one = logged(digits_like(), 4)
  two = logged(digits_like(devices=2, lanes=lanes), 4)
  assert_same(one, two, rtol=2e-4, atol=2e-6)


@pytest.mark.usefixtures("exact")
@pytest.mark.slow
def test_a_fixed_order_of_sums_gives_the_same_bits():
  if jax.devices()[0].platform != "cpu":
    pytest.skip("promised for CPUs")
  one, two = (
    logged(digits_like(devices=n), 4, deterministic_reduction=3) for n in (1, 2)
  )
  assert_same(one, two)
  free = logged(digits_like(), 4)
  assert_same(one, free, rtol=2e-4, atol=2e-6)


def test_pieces_of_a_model_tell_the_same():
  if jax.device_count() < 2:
    pytest.skip("needs 2 devices")
  whole = logged(digits_like(), 2)
  pieces = logged(digits_like(devices=2), 2, model_devices=2)
  assert_same(whole, pieces, rtol=2e-4, atol=2e-6)


def test_empty_cohorts_have_no_lines():
  drawn = cohorts([], [2, 0], [])
  simulator = make_simulator(
    quadratic(7), algorithm_of("mean"), copies(), sampler=drawn
  )
  found = logged(simulator, 3)
  np.testing.assert_array_equal(found["round"], [2, 2])
  np.testing.assert_array_equal(found["client"], [0, 2])
  poisson = digits_like(sampler=sampling.poisson(6, 1.0), clients_per_round=1)
  ids = [np.sort(poisson.sampler.sample(0, i)) for i in range(8)]
  assert min(map(len, ids)) == 0
  found = logged(poisson, 8)
  np.testing.assert_array_equal(found["client"], np.concatenate(ids))
  np.testing.assert_array_equal(
    found["round"], np.repeat(np.arange(1, 9), [len(x) for x in ids])
  )


def test_a_round_that_fails_leaves_the_lines_before_it():
  simulator = make_simulator(
    quadratic(7),
    algorithm_of("mean"),
    copies(),
    sampler=cohorts([0, 1], [5]),
    rounds_per_dispatch=2,
  )
  simulator = dataclasses.replace(simulator, log_clients=True)
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 2))
  assert out.failure is not None
  np.testing.assert_array_equal(out.client_log["client"], [0, 1])


def test_without_the_log_nothing_of_clients_leaves_the_device():
  simulator = digits_like()
  planned = simulator.plan(0, 1)
  shapes = jax.eval_shape(
    simulator.compiler.function,
    simulator.states.shapes,
    simulator.states.traced(),
    simulator.residency.shapes(*simulator.planner.shape(*planned.key)[::2]),
    planned.cohorts,
    1,
  )[1]
  assert shapes.client_values == {}


def test_memory_is_that_of_the_cohort_s_updates():
  """Compiled for 20 and for 60 clients: an update more for each of the 40."""
  data = blobs([4] * 60, features=64)
  task = MODELS["lr"](data)
  sizes = {}
  for count in (20, 60):
    for log_clients in (False, True):
      simulator = dataclasses.replace(
        make_simulator(
          task,
          fedavg(task, sgd(0.1), sgd(1.0)),
          data,
          clients_per_round=count,
        ),
        log_clients=log_clients,
      )
      sizes[count, log_clients] = simulator.compiler.program(
        1, count
      ).device_bytes
  grown = [sizes[60, log] - sizes[20, log] for log in (False, True)]
  update = 4 * simulator.states.num_parameters
  assert 40 * update <= grown[1] - grown[0] < 1.3 * 40 * update


def test_refusals(monkeypatch):
  with pytest.raises(TypeError, match="log_clients='yes'"):
    dataclasses.replace(digits_like(), log_clients="yes")
  config = flags.load(str(DIGITS), {"server.client_log": "True"})
  assert build.build(config).simulator.log_clients
  config.server.client_log = True
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(ImportError, match="pip install pyarrow"):
    build.build(config)
