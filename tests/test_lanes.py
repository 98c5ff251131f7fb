"""The choice of lanes: as logic, on plans, and in a real run."""

import itertools
import math
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.distributed import memory
from fedjax_sim.engine import plan as cohorts
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.simulation import lanes
from fedjax_sim.simulation.lanes import Probe
from problems import MODELS, blobs, flat, make_simulator, params_of, sgd, train

GB = 10**9


def choose(probes, limit=GB, rounds=math.inf):
  """The choice, and what was tried; probes: lanes -> fields of `Probe`."""
  tried = []

  def probe(size):
    tried.append(size)
    return probes[size] and Probe(*probes[size])

  return lanes.choose(probe, sorted(probes), limit, rounds), tried


# --- the decision -------------------------------------------------------------


def test_the_fastest_wins():
  choice, tried = choose({1: (8, 1), 4: (3, 1), 16: (1, 1), 40: (0.5, 1)})
  assert choice.lanes == 40
  assert tried == [1, 4, 16, 40]


@pytest.mark.parametrize(("seconds", "best"), [(0.92, 1), (0.90, 4)])
def test_more_lanes_must_be_faster_by_a_tenth(seconds, best):
  choice, _ = choose({1: (1.0, 1), 4: (seconds, 1)})
  assert choice.lanes == best


def test_small_gains_add_up():
  """4 lanes are hardly faster than 1, but 16 are faster than 1 by a tenth."""
  choice, _ = choose({1: (1.0, 1), 4: (0.95, 1), 16: (0.89, 1)})
  assert choice.lanes == 16


def test_it_stops_where_it_gets_clearly_slower():
  probes = {1: (1.0, 1), 4: (1.2, 1), 16: (0.1, 1)}
  choice, tried = choose(probes)
  assert choice.lanes == 1
  assert tried == [1, 4]
  probes[4] = (1.05, 1)  # a little slower: go on
  choice, tried = choose(probes)
  assert choice.lanes == 16
  assert tried == [1, 4, 16]


def test_what_does_not_fit_is_not_chosen():
  probes = {1: (8, GB // 2), 4: (4, GB), 16: (1, GB + 1), 40: (0.1, 2 * GB)}
  choice, tried = choose(probes)
  assert choice.lanes == 4
  assert tried == [1, 4, 16]
  assert "16: too large, 1000 MB" in choice.reason


def test_the_smallest_is_taken_even_if_it_does_not_fit():
  choice, _ = choose({1: (1, 2 * GB), 4: (0.1, 3 * GB)})
  assert choice.lanes == 1


def test_the_reason_names_what_was_measured():
  choice, _ = choose({1: (0.0123, 1), 4: (0.5, 1), 16: (0.1, 1)})
  assert choice.reason == (
    "predicted time of a round by lanes: 1: 12.3 ms, 4: 500 ms"
  )


def test_a_short_run_is_not_spent_on_choosing():
  """Of three rounds of 3 s choosing takes no second compilation of 4 s."""
  probes = {1: (3.0, 1, 4.0, 0.2), 4: (0.5, 1, 4.0, 0.2), 16: (0.1, 1, 4, 0.2)}
  choice, tried = choose(probes, rounds=3)
  assert (choice.lanes, tried) == (1, [1])
  assert choice.reason.endswith("3e+03 ms, 4: not tried in a run this short")
  # The next is tried from the round on where it takes a tenth: (0.2 + 1.5 *
  # 4.2) / 0.3 = 21.7; the one after, (4.4 + 1.5 * 4.2) / 0.05 = 214, as it is
  # a tenth of faster rounds, and 4 lanes were compiled for a use.
  assert choose(probes, rounds=21)[1] == [1]
  assert choose(probes, rounds=22)[1] == [1, 4]
  assert choose(probes, rounds=213)[1] == [1, 4]
  assert choose(probes, rounds=215)[1] == [1, 4, 16]
  nothing, tried = choose({1: None, 4: (0.1, 1)}, rounds=1)
  assert (nothing.lanes, tried) == (1, [1])
  assert nothing.reason == "the run is too short to measure others"


@given(
  seconds=st.lists(st.floats(1e-3, 10), min_size=5, max_size=5),
  compiling=st.floats(0.1, 10),
  measuring=st.floats(0.0, 0.1),
  rounds=st.integers(1, 1000),
)
def test_what_is_tried_takes_a_tenth_of_the_run(
  seconds, compiling, measuring, rounds
):
  probes = {
    4**i: (x, 1, compiling * (1 + i / 10), measuring)
    for i, x in enumerate(seconds)
  }
  choice, tried = choose(probes, rounds=rounds)
  for i in range(1, len(tried)):
    # All that is in vain when a size has been tried, if it is not taken.
    before = min(probes[size][0] for size in tried[:i])
    spent = sum(probes[size][2] + probes[size][3] for size in tried[: i + 1])
    kept = max(probes[size][2] for size in tried[:i])
    assert spent - kept <= 0.1 * rounds * before + 1e-9
  assert choice.lanes in tried


@given(run=st.floats(0, 1e6))
def test_what_is_timed_takes_half_of_the_share(run):
  steps = lanes.probe_steps(run)
  assert 0 <= steps <= lanes.PROBE_STEPS
  assert lanes.PROBE_CALLS * steps <= 0.05 * run
  assert steps == lanes.PROBE_STEPS or lanes.PROBE_CALLS * (steps + 1) > (
    0.05 * run * (1 - 1e-12)
  )
  assert lanes.probe_steps(math.inf) == lanes.PROBE_STEPS


@given(size=st.integers(1, 10**6), devices=st.integers(1, 64))
def test_candidates_grow_up_to_a_devices_share(size, devices):
  sizes = lanes.candidates(size, devices)
  assert sizes == sorted(set(sizes))
  assert sizes[0] == 1
  assert (sizes[-1] - 1) * devices < size <= sizes[-1] * devices
  assert all(b <= 4 * a for a, b in itertools.pairwise(sizes))
  assert len(sizes) <= 11  # one compilation each


def test_candidates():
  assert lanes.candidates(1, 1) == [1]
  assert lanes.candidates(2, 2) == [1]
  assert lanes.candidates(10, 1) == [1, 4, 10]
  assert lanes.candidates(16, 1) == [1, 4, 16]
  assert lanes.candidates(100, 3) == [1, 4, 16, 34]


GIB = 2**30


@pytest.mark.parametrize(
  ("groups", "files", "expected"),
  [
    ("", {}, 8),
    ("0::/\n", {}, 8),
    ("0::/\n", {"": ("max", 1, 0)}, 8),
    ("0::/a/b\n", {"a/b": (4 * GIB, GIB, 0)}, 3),
    ("0::/a/b\n", {"a/b": (4 * GIB, 3 * GIB, 2 * GIB)}, 3),  # files dropped
    ("0::/a/b\n", {"a/b": ("max", GIB, 0), "a": (2 * GIB, GIB, 0)}, 1),
    ("0::/a/b\n", {"a": (64 * GIB, GIB, 0)}, 8),
    ("0::/host/path\n", {"": (3 * GIB, GIB, 0)}, 2),  # as in a container
    ("0::/a\n", {"a": (GIB, 2 * GIB, 0)}, 0),
    ("4:memory:/x\n2:cpu:/\n", {"memory/x": (4 * GIB, GIB, 0)}, 3),
    ("4:cpu,memory:/x\n0::/\n", {"memory": (5 * GIB, GIB, 0)}, 4),
    ("4:memory:/\n", {"memory": (2**63 - 4096, GIB, 0)}, 8),
  ],
)
def test_memory_is_that_of_the_control_groups(
  groups, files, expected, tmp_path
):
  (tmp_path / "proc/self").mkdir(parents=True)
  (tmp_path / "proc/meminfo").write_text(
    f"MemTotal: {2 * 8 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n"
  )
  (tmp_path / "proc/self/cgroup").write_text(groups)
  for name, (limit, used, cache) in files.items():
    folder = tmp_path / "sys/fs/cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    first = name.startswith("memory")
    kinds = (
      ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
    )
    for kind, number in zip(kinds, (limit, used), strict=True):
      (folder / f"memory.{kind}").write_text(f"{number}\n")
    key = "total_inactive_file" if first else "inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{key} {cache}\n")
  assert memory.available_memory(tmp_path) == expected * GIB


def test_the_memory_limit_leaves_some():
  limit = memory.memory_limit(jax.devices()[0])
  assert 2**20 < limit < 2**50


# --- the plan that is timed ---------------------------------------------------


@st.composite
def plans(draw):
  sizes = np.array(
    draw(st.lists(st.integers(1, 200), min_size=1, max_size=40)), np.int64
  )
  passes = draw(st.integers(1, 2))
  batchings = [LocalBatching(batch_size=b) for b in (2, 7)[:passes]]
  lanes_, devices = draw(st.integers(1, 8)), draw(st.integers(1, 3))
  shape = cohorts.capacity(
    [sizes] * passes, batchings, len(sizes), lanes=lanes_, devices=devices
  )
  offsets = np.append(0, np.cumsum(sizes))
  ids = np.arange(len(sizes))
  return cohorts.plan(
    [offsets] * passes, batchings, ids, shape, seed=0, round_=0
  )


def steps_run(plan):
  """Wave steps that each device runs, by a walk through the plan."""
  totals = []
  for device, waves in enumerate(plan.num_waves):
    total = 0
    for wave in range(waves):
      for p in range(plan.num_steps.shape[-1]):
        total += plan.num_steps[device, wave, :, p].max()
    totals.append(total)
  return totals


@given(plan=plans(), most=st.sampled_from([1, 7, lanes.PROBE_STEPS]))
def test_a_shortened_plan_is_the_beginning_of_the_plan(plan, most):
  short = lanes.shortened(plan, most)
  assert np.all(short.num_waves <= plan.num_waves)
  assert np.all(short.num_steps <= plan.num_steps)
  np.testing.assert_array_equal(short.num_waves > 0, plan.num_waves > 0)
  for name in ("client", "start", "num_examples", "version"):
    np.testing.assert_array_equal(getattr(short, name), getattr(plan, name))
  for old, new in zip(plan, short, strict=True):
    if isinstance(old, np.ndarray):
      assert new.shape == old.shape
      assert new.dtype == old.dtype
  # About so many steps, and no more than the last wave above it.
  passes = plan.num_steps.shape[-1]
  for device, (full, some) in enumerate(
    zip(steps_run(plan), steps_run(short), strict=True)
  ):
    assert some <= most * (1 + passes)
    longest = plan.num_steps[device].max(initial=0)
    if longest <= most:
      assert some >= min(full, most)
  # What predicts the whole round from it counts the steps that are run.
  assert cohorts.wave_steps(short) == max(steps_run(short))
  assert cohorts.wave_steps(plan) == max(steps_run(plan))


# --- a real run ---------------------------------------------------------------


def test_auto_takes_a_candidate_and_changes_no_result():
  data = blobs([3, 5, 2, 4, 6, 1])
  task = MODELS["lr"](data)

  def run(width):
    simulator = make_simulator(
      task,
      fedavg(task, sgd(0.2), sgd(1.0)),
      data,
      clients_per_round=5,
      lanes=width,
    )
    simulator.choose_lanes()  # as for a long run
    return simulator, flat(params_of(simulator, train(simulator, 3)))

  auto, params = run("auto")
  choice = auto.choose_lanes()
  assert choice.lanes in lanes.candidates(5, 1) == [1, 4, 5]
  assert choice.reason.startswith("predicted time of a round by lanes: 1: ")
  assert auto.compilations == 1
  given_, same = run(choice.lanes)
  assert given_.choose_lanes() == (choice.lanes, "as given")
  np.testing.assert_array_equal(params, same)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a CPU alone")
def test_a_run_of_few_steps_is_not_measured():
  data = blobs([3, 5, 2, 4, 6, 1])
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.2), sgd(1.0)),
    data,
    clients_per_round=5,
    lanes="auto",
  )
  train(simulator, 2)  # at most 10 clients of at most 2 steps
  assert simulator.choose_lanes() == (
    1,
    "the run is too short to measure others",
  )
  assert simulator.compilations == len(simulator.compiler.compiled) == 1


@pytest.mark.parametrize(("rounds", "measured"), [(100, [1]), (10**5, [1, 2])])
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a CPU alone")
def test_time_that_choosing_takes(monkeypatch, rounds, measured):
  """By a clock that counts compiling as 5 s and a step as 1 ms."""
  data = blobs([3, 5])  # 1 and 2 steps
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.2), sgd(1.0)),
    data,
    lanes="auto",
  )
  now, tried = 0.0, []

  def program(self, width, size):
    nonlocal now
    now += 5.0
    tried.append(width)
    return types.SimpleNamespace(device_bytes=1)

  def dispatch(self, state, planned):
    nonlocal now
    seconds = 0.001 * cohorts.wave_steps(planned.cohorts)
    now += seconds
    return types.SimpleNamespace(seconds=seconds)

  monkeypatch.setattr(type(simulator.compiler), "program", program)
  monkeypatch.setattr(type(simulator), "dispatch", dispatch)
  clock = types.SimpleNamespace(perf_counter=lambda: now)
  monkeypatch.setattr(lanes, "time", clock)
  choice = simulator.choose_lanes(rounds)
  assert tried == measured
  run = 0.003 * rounds
  assert now - 5.0 <= 0.1 * run
  # Both clients at once take the 2 steps of the longer one.
  assert choice.lanes == measured[-1]
  assert choice.reason.startswith(
    "predicted time of a round by lanes: 1: 3 ms, 2: "
  )


def test_auto_measures_nothing_where_there_is_no_choice(monkeypatch):
  data = blobs([3, 5])
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.2), sgd(1.0)),
    data,
    clients_per_round=1,
    lanes="auto",
  )
  monkeypatch.setattr(lanes, "choose", None)  # it would be called
  assert simulator.choose_lanes().lanes == 1
