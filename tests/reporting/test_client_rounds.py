"""The clients' table and its parts."""

import numpy as np
import pytest

from fedjax_sim.reporting import client_rounds
from fedjax_sim.reporting.client_rounds import (
  ClientRounds,
  draw_client_rounds,
  join_client_rounds,
  remove_parts,
)

parquet = pytest.importorskip("pyarrow.parquet")


def lines(first, last):
  """Round r has r % 3 clients; none has a line if that is 0."""
  rounds = np.repeat(
    np.arange(first, last + 1), np.arange(first, last + 1) % 3
  ).astype(np.int32)
  return {
    "round": rounds,
    "client": np.where(np.diff(rounds, prepend=0) == 0, 5, 3).astype(np.int32),
    "present": rounds % 2 == 0,
    "update/norm": np.where(rounds == 4, np.nan, rounds / 7).astype(np.float32),
  }


def write(folder, cuts, *, done=0, table="none"):
  """Writes parts that end with these rounds."""
  file = ClientRounds(folder / "parts", folder / table, keep_through=done)
  for end in cuts:
    file.append(end, lines(done + 1, end))
    file.sync()
    done = end
  return file


def joined(folder, name="table"):
  join_client_rounds(folder / "parts", folder / name)
  return (folder / name).read_bytes()


def test_the_table_holds_all_lines_however_they_were_cut(tmp_path, monkeypatch):
  monkeypatch.setattr(client_rounds, "_GROUP", 4)
  for name, cuts in {"a": [11], "b": [1, 2, 3, 7, 11], "c": [9, 11]}.items():
    (tmp_path / name).mkdir()
    write(tmp_path / name, cuts).close()
  assert joined(tmp_path / "a") == joined(tmp_path / "b")
  assert joined(tmp_path / "a") == joined(tmp_path / "c")
  file = parquet.ParquetFile(tmp_path / "a" / "table")
  metadata = file.metadata
  groups = [metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
  assert groups == [4, 4, 4]
  table = file.read()
  for name, values in lines(1, 11).items():
    found = table[name].to_numpy()
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_what_was_not_synced_is_written_when_it_closes(tmp_path):
  file = write(tmp_path, [2])
  file.append(5, lines(3, 5))
  file.close()
  names = sorted(p.name for p in (tmp_path / "parts").iterdir())
  assert names == [
    "0000000001-0000000002.parquet",
    "0000000003-0000000005.parquet",
  ]


def test_parts_beyond_the_checkpoint_go(tmp_path):
  write(tmp_path, [2, 4, 7])
  whole = joined(tmp_path, "whole")
  write(tmp_path, [5, 7], done=4).close()
  assert joined(tmp_path) == whole
  write(tmp_path, [1], done=0)  # from the start again
  assert len(list((tmp_path / "parts").iterdir())) == 1


def test_a_missing_part_is_refused(tmp_path):
  write(tmp_path, [2, 4])
  (tmp_path / "parts" / "0000000001-0000000002.parquet").unlink()
  with pytest.raises(ValueError, match="rounds up to 0.*checkpoint is of"):
    write(tmp_path, [], done=4)


@pytest.mark.parametrize("done", [4, 7])
def test_parts_come_back_from_the_table(tmp_path, done):
  write(tmp_path, [2, 7])
  whole = joined(tmp_path)
  remove_parts(tmp_path / "parts")
  cuts = [7] if done < 7 else []
  file = ClientRounds(tmp_path / "parts", tmp_path / "table", keep_through=done)
  for end in cuts:
    more = lines(1, end)
    late = more["round"] > done
    file.append(end, {k: v[late] for k, v in more.items()})
  file.close()
  assert joined(tmp_path, "again") == whole


@pytest.mark.parametrize("last", [1, 2, 40])
def test_the_drawing(tmp_path, last):
  write(tmp_path, [last])
  joined(tmp_path)
  for name in ("a.png", "b.png"):
    draw_client_rounds(tmp_path / "table", tmp_path / name, "a $title")
  image = (tmp_path / "a.png").read_bytes()
  assert image.startswith(b"\x89PNG")
  assert image == (tmp_path / "b.png").read_bytes()


def test_rounds_are_told_apart_across_batches():
  class File:
    def iter_batches(self, columns):
      del columns
      import pyarrow as pa

      for values in ([1, 1], [1], [1, 3, 3], [4], [5, 6]):
        yield pa.RecordBatch.from_pydict({"round": values, "x": values})

  found = [
    (r, v["x"].tolist()) for r, v in client_rounds._by_round(File(), ["x"])
  ]
  assert found == [
    (1, [1, 1, 1, 1]),
    (3, [3, 3]),
    (4, [4]),
    (5, [5]),
    (6, [6]),
  ]
