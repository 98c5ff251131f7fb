"""Rows survive kills: none lost, none doubled, the same bytes."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.reporting import MetricsFile, columns, read_metrics

VALUES = st.one_of(st.floats(), st.integers(-(2**60), 2**60))
METRICS = st.dictionaries(
  st.sampled_from(["train/loss", "test/accuracy", "clients", 'a "{}"\né']),
  VALUES,
)


def some_rows(rounds):
  return [{"round": r, "train/loss": 1 / r, "clients": 10} for r in rounds]


def write(path, rows, **options):
  with MetricsFile(path, keep_through=0, **options) as file:
    file.append(rows)


def resume(path, keep_through, **options):
  with MetricsFile(path, keep_through=keep_through, **options):
    pass


@st.composite
def killed_runs(draw):
  """(rows, keep_through, whether each round has one, a place to cut at)."""
  complete = draw(st.booleans())
  rounds = list(range(1, 1 + draw(st.integers(0, 6))))
  if not complete:
    rounds = [r for r in rounds if draw(st.booleans())]
  rows = [{"round": r, **draw(METRICS)} for r in rounds]
  keep_through = draw(st.integers(0, max(rounds, default=0)))
  return rows, keep_through, complete, draw(st.floats(0, 1))


@given(killed_runs())
def test_a_cut_anywhere_after_the_checkpoint_leaves_no_trace(run):
  rows, keep_through, complete, cut = run
  kept = [row for row in rows if row["round"] <= keep_through]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "undisturbed.jsonl"
    write(path, kept, complete=complete)
    safe = path.stat().st_size
    write(path, rows, complete=complete)
    undisturbed = path.read_bytes()

    path = Path(folder) / "killed.jsonl"
    end = safe + round(cut * (len(undisturbed) - safe))
    path.write_bytes(undisturbed[:end])
    with MetricsFile(
      path, keep_through=keep_through, complete=complete
    ) as file:
      assert [row["round"] for row in read_metrics(path)] == [
        row["round"] for row in kept
      ]
      file.append(rows[len(kept) :])
    assert path.read_bytes() == undisturbed


@given(METRICS)
def test_rows_read_back_exactly(metrics):
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "metrics.jsonl"
    write(path, [{**metrics, "round": 1}])
    (row,) = read_metrics(path)
  assert list(row) == ["round", *metrics]
  for key, value in metrics.items():
    if math.isfinite(value):
      assert row[key] == value
      assert type(row[key]) is type(value)
    else:
      assert math.isnan(row[key])


def test_one_object_a_line_with_the_round_first(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, [{"b": np.float32(0.5), "round": np.int64(1), "a": math.inf}])
  assert path.read_text() == '{"round": 1, "b": 0.5, "a": null}\n'


def test_rows_are_visible_at_once(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsFile(path, keep_through=0) as file:
    for row in some_rows([1, 2]):
      file.append([row])
      file.sync()
      assert read_metrics(path)[-1] == row


def test_a_file_that_needs_no_cut_is_not_rewritten(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, some_rows([1, 2]))
  before = path.stat()
  resume(path, 2)
  assert path.stat() == before
  resume(path, 1)
  assert path.stat().st_ino != before.st_ino
  assert [row["round"] for row in read_metrics(path)] == [1]


def test_a_row_that_lacks_only_its_end_of_line_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, some_rows([1, 2]))
  content = path.read_bytes()
  path.write_bytes(content[:-1])
  assert len(read_metrics(path)) == 2
  resume(path, 2)
  assert path.read_bytes() == content


def test_a_reader_skips_a_torn_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, some_rows([1, 2]))
  path.write_bytes(path.read_bytes()[:-5])
  assert [row["round"] for row in read_metrics(path)] == [1]


@pytest.mark.parametrize(
  "damage", ["{]", "", "[1]", '{"round": true}', '{"loss": 1}', "\0\0\0\0"]
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_line_is_named(tmp_path, damage, complete):
  path = tmp_path / "metrics.jsonl"
  write(path, some_rows([1, 2, 3, 4]))
  lines = path.read_text().splitlines()
  lines[1] = damage
  content = "".join(f"{line}\n" for line in lines)
  path.write_text(content)
  with pytest.raises(ValueError, match=f"{path}, line 2 is damaged"):
    resume(path, 4, complete=complete)
  with pytest.raises(ValueError, match=f"{path}, line 2 is damaged"):
    read_metrics(path)
  assert path.read_text() == content, "the evidence was changed"


def test_damage_after_the_checkpoint_is_cut_off(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, some_rows([1, 2]))
  content = path.read_bytes()
  path.write_bytes(content + b"\0\0\n{}\n")
  resume(path, 2)
  assert path.read_bytes() == content


@pytest.mark.parametrize(
  ("rounds", "message"),
  [
    ([1, 3, 4], "line 2: a row of round 3 stands where round 2 belongs"),
    ([1, 1, 2], "line 2: a row of round 1 stands where round 2 belongs"),
    ([2, 3, 4], "line 1: a row of round 2 stands where round 1 belongs"),
    ([1, 3, 2], "line 2: a row of round 3 stands where round 2 belongs"),
    ([1, 2], "ends with round 2, but the checkpoint is of round 3"),
    ([], "ends with round 0, but the checkpoint is of round 3"),
  ],
)
def test_a_complete_file_has_every_round_once(tmp_path, rounds, message):
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(f"{json.dumps(r)}\n" for r in some_rows(rounds)))
  with pytest.raises(ValueError, match=message):
    resume(path, 3)


def test_gaps_are_allowed_where_said(tmp_path):
  path = tmp_path / "timings.jsonl"
  write(path, some_rows([2, 5, 9]), complete=False)
  resume(path, 7, complete=False)
  assert [row["round"] for row in read_metrics(path)] == [2, 5]
  with (
    MetricsFile(path, keep_through=7, complete=False) as file,
    pytest.raises(ValueError, match="round 7 stands where a round after 7"),
  ):
    file.append(some_rows([7]))


@pytest.mark.parametrize("rounds", [[3], [5], [4, 4], [4, 6]])
def test_no_row_is_appended_out_of_order(tmp_path, rounds):
  path = tmp_path / "metrics.jsonl"
  write(path, some_rows([1, 2, 3]))
  with MetricsFile(path, keep_through=3) as file:
    with pytest.raises(ValueError, match="stands where round"):
      file.append(some_rows(rounds))
    file.append(some_rows([4]))
  assert [row["round"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_row_without_a_round_is_refused(tmp_path):
  with (
    MetricsFile(tmp_path / "metrics.jsonl", keep_through=0) as file,
    pytest.raises(TypeError, match="round=None"),
  ):
    file.append([{"train/loss": 1.0}])


def test_columns_skip_the_rounds_without_the_key():
  rows = [{"round": 1, "a": 1.0}, {"round": 2, "a": 2.0, "b": 3.0}]
  assert columns(rows) == {"a": ([1, 2], [1.0, 2.0]), "b": ([2], [3.0])}
