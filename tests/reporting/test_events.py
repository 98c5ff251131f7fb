"""Event files, read back without TensorBoard."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from fedjax_sim.reporting import EventFiles, event_records

ROWS = [
  {"round": 1, "train/loss": 0.5, "clients": 10},
  {"round": 2, "train/loss": math.nan, "clients": 9, "test/accuracy": 0.75},
]


def masked_crc32c(content):
  """By tensorboardX; the mask as in TFRecord's description."""
  crc = crc32c(content)
  return ((crc >> 15 | (crc << 17) % 2**32) + 0xA282EAD8) % 2**32


def read_events(folder):
  """The events of all files, in the order in which TensorBoard reads them."""
  events = []
  for path in sorted(folder.glob("events.out.tfevents.*")):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      event, rest = content[12 : 12 + length], content[12 + length :]
      assert content[8:12] == struct.pack("<I", masked_crc32c(content[:8]))
      assert rest[:4] == struct.pack("<I", masked_crc32c(event))
      events.append(event_pb2.Event.FromString(event))
      content = rest[4:]
  return events


def read_scalars(folder):
  """Tag -> step -> value, as TensorBoard sees it: restarts purge."""
  scalars: dict[str, dict[int, float]] = {}
  for event in read_events(folder):
    if event.session_log.status == event.session_log.START:
      for values in scalars.values():
        for step in [step for step in values if step >= event.step]:
          del values[step]
    for value in event.summary.value:
      scalars.setdefault(value.tag, {})[event.step] = value.simple_value
  return scalars


def test_all_but_the_round_are_scalars(tmp_path):
  events = EventFiles(tmp_path / "new" / "events")
  events.write(ROWS[:1])
  events.write(ROWS[1:])
  events.close()
  events.close()
  scalars = read_scalars(tmp_path / "new" / "events")
  assert scalars == {
    "train/loss": {1: 0.5, 2: pytest.approx(math.nan, nan_ok=True)},
    "clients": {1: 10, 2: 9},
    "test/accuracy": {2: 0.75},
  }
  first = read_events(tmp_path / "new" / "events")[0]
  assert first.file_version == "brain.Event:2"
  assert first.wall_time > 1.7e9


def test_flush_brings_all_rows_to_the_disk(tmp_path):
  events = EventFiles(tmp_path)
  events.write(ROWS)
  events.flush()
  assert read_scalars(tmp_path)["clients"] == {1: 10, 2: 9}
  events.close()


def test_a_resumed_run_replaces_the_rounds_that_it_repeats(tmp_path):
  before = EventFiles(tmp_path)
  before.write([{"round": r, "a": r} for r in (1, 2, 3, 4)])
  before.flush()  # then killed
  after = EventFiles(tmp_path, first_round=3)
  after.write([{"round": 3, "a": 30}])
  after.close()
  assert read_scalars(tmp_path) == {"a": {1: 1, 2: 2, 3: 30}}
  before.close()


@given(
  st.floats(0, 1e12),
  st.integers(0, 2**63 - 1),
  st.dictionaries(st.text(), st.floats(width=32), max_size=5),
)
def test_records_are_those_of_protocol_buffers(seconds, step, values):
  record = event_records.scalars(seconds, step, values)
  event = event_pb2.Event.FromString(record[12:-4])
  assert event.wall_time == seconds
  assert event.step == step
  found = {v.tag: v.simple_value for v in event.summary.value}
  assert found.keys() == values.keys()
  for tag, value in values.items():
    assert struct.pack("<f", found[tag]) == struct.pack("<f", value)
  assert record[-4:] == struct.pack("<I", masked_crc32c(record[12:-4]))


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_numbers_beyond_float32_are_infinite(value):
  record = event_records.scalars(0.0, 1, {"a": value})
  event = event_pb2.Event.FromString(record[12:-4])
  assert event.summary.value[0].simple_value == math.copysign(math.inf, value)
