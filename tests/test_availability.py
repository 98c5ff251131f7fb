"""Cohorts among the clients whose devices are ready."""

import pathlib

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.config import flags
from fedjax_sim.config.build import build
from fedjax_sim.data import locate
from fedjax_sim.sampling import available, load_trace, make_trace
from test_features import DIGITS

INTERVALS = st.lists(
  st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 9)).map(
      lambda x: (x[0], x[0] + x[1])
    ),
    max_size=5,
  ),
  min_size=1,
  max_size=5,
).filter(lambda devices: any(a < b for device in devices for a, b in device))


def trace_of(devices):
  flat = [interval for device in devices for interval in device]
  return make_trace(
    np.array(flat), np.cumsum([0, *map(len, devices)]).astype(np.int32)
  )


@given(devices=INTERVALS)
def test_who_is_ready(devices):
  """As a set of seconds says it, device by device."""
  trace = trace_of(devices)
  assert trace.seconds == max(b for d in devices for a, b in d if a < b)
  for time in range(40):
    now = time % int(trace.seconds)
    expected = [
      i
      for i, device in enumerate(devices)
      if any(begin <= now < end for begin, end in device)
    ]
    assert trace.ready(time).tolist() == expected


@given(
  devices=INTERVALS,
  seed=st.integers(0, 99),
  clients=st.integers(1, 40),
  data=st.data(),
)
def test_only_those_take_part_who_are_ready(devices, seed, clients, data):
  trace = trace_of(devices)
  size = data.draw(st.integers(1, clients))
  everybody = available(clients, clients, trace, 1.0)
  sampler = available(clients, size, trace, 1.0)
  for round_ in range(5):
    ready = everybody.sample(seed, round_)
    ids = sampler.sample(seed, round_)
    assert len(np.unique(ids)) == len(ids) == min(size, len(ready))
    assert set(ids) <= set(ready)
    if not len(trace.ready(round_)):
      assert not len(ready)
    if len(trace.ready(round_)) == len(devices):
      assert len(ready) == clients
  assert 0 <= sampler.expected <= size


def test_every_client_that_is_ready_is_as_likely():
  trace = trace_of([[(0, 10)], [(20, 30)], [(0, 30)]])
  ready = available(30, 30, trace, 1e-9).sample(0, 0)
  assert len(ready) == 20  # two devices of three
  sampler = available(30, 5, trace, 1e-9)
  counts = np.zeros(30)
  for round_ in range(3000):
    counts[sampler.sample(0, round_)] += 1
  assert counts.sum() == counts[ready].sum() == 15_000
  # Without replacement counts vary less than those of independent draws.
  statistic = np.sum((counts[ready] - 750) ** 2 / (750 * 15 / 20)) * 19 / 20
  assert 1e-3 < scipy.stats.chi2.cdf(statistic, 19) < 1 - 1e-3


@pytest.mark.parametrize("round_seconds", [1.0, 60.0, 150.0])
def test_the_mean_cohort_whatever_a_round_lasts(round_seconds):
  trace = trace_of([[(50, 100)]])
  sampler = available(5, 5, trace, round_seconds)
  assert sampler.expected == pytest.approx(2.5, abs=0.3)


def test_a_cohort_that_varies_makes_no_share_of_noise():
  changes = {
    "sampler.name": "available",
    "sampler.trace": str(pathlib.Path(__file__).parent / "trace.npz"),
    "aggregator.name": "secure_mean",
    "aggregator.clip": "1.0",
    "aggregator.noise_multiplier": "1.0",
  }
  with pytest.raises(ValueError, match=r"sampler.name does not promise"):
    build(flags.load(str(DIGITS), changes))


def test_a_draw_depends_on_the_cohort_not_on_the_population():
  trace = trace_of([[(0, 10)], [(0, 5)]])
  ids = available(10**12, 100, trace, 1.0).sample(0, 0)
  assert len(np.unique(ids)) == 100
  assert ids.max() > 10**10


@pytest.mark.parametrize(
  ("intervals", "offsets", "message"),
  [
    ([[5, 4]], [0, 1], r"Device 0 is ready from 5.0 to 4.0"),
    ([[5, 5]], [0, 1], r"No device is ever ready"),
    ([[0, 1], [-1, 2]], [0, 1, 2], r"Device 1 is ready from -1.0"),
    ([[0.0, np.nan]], [0, 1], r"Device 0 is ready from 0.0 to nan"),
    ([[0, 1]], [0, 2], r"do not go from 0 to the 1 intervals"),
    ([[0, 1], [1, 2]], [0, 2, 1, 2], r"that never fall"),
    ([[0, 1]] * 3, np.array([0, 4, 3], np.uint32), r"that never fall"),
    ([[0, 1]], 1, r"do not go from 0"),
    ([0, 1], [0, 1], r"intervals has shape \(2,\)"),
  ],
)
def test_what_is_no_trace(intervals, offsets, message):
  with pytest.raises(ValueError, match=message):
    make_trace(np.array(intervals), np.array(offsets))


def test_what_a_file_lacks(tmp_path):
  file = tmp_path / "trace.npz"
  np.savez(file, intervals=np.array([[0, 1]]))
  with pytest.raises(ValueError, match=r"trace.npz lacks 'offsets'"):
    load_trace(str(file))
  np.savez(file, intervals=np.array(["a"]), offsets=np.array([0, 1]))
  with pytest.raises(TypeError, match=r"trace: .*give numbers"):
    load_trace(str(file))
  with pytest.raises(FileNotFoundError, match=r"trace"):
    load_trace(str(tmp_path / "none.npz"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sampler.name": "available"}, r"lacks the argument 'sampler.trace'"),
    ({"sampler.trace": "t.npz"}, r"uniform' does not take 'sampler.trace'"),
    (
      {"sampler.round_seconds": "5.0", "sampler.name": "cyclic"},
      r"'cyclic' does not take 'sampler.round_seconds'",
    ),
  ],
)
def test_configs_that_contradict(changes, message):
  with pytest.raises(ValueError, match=message):
    build(flags.load(str(DIGITS), changes))


@pytest.mark.slow  # of data that not every machine has
def test_real_phones():
  """FLASH: 2,875 phones over 126 hours; more are ready at night."""
  try:
    file = locate(pathlib.Path("traces/flash_ready_strict.npz"))
  except (ValueError, FileNotFoundError) as error:
    pytest.skip(f"needs the FLASH trace: {error}")
  trace = load_trace(str(file))
  assert trace.devices == 2875
  assert trace.seconds / 3600 == pytest.approx(126, abs=1)
  ready = [len(trace.ready(3600 * hour)) for hour in range(126)]
  assert min(ready) < 0.5 * max(ready) < 0.5 * trace.devices
  changes = {
    "sampler.name": "available",
    "sampler.trace": str(file),
    "sampler.round_seconds": "600.0",
    "server.rounds": "3",
  }
  simulator = build(flags.load(str(DIGITS), changes)).simulator
  drawn = [len(simulator.sampler.sample(0, r)) for r in range(50)]
  assert max(drawn) <= 20
  state = simulator.init()
  for out in simulator.run(state, 3):
    for row in out.rows:
      assert row["clients"] == drawn[int(row["round"]) - 1]
