"""Which fields a store gets: chosen, mapped, and of which dtype."""

import json
from typing import Any

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedjax_sim.data import importers, open_store
from fedjax_sim.data.importers import examples, import_store
from fedjax_sim.data.importers.fields import assigned

PAIRS = [
  ("a", {"p1": 1, "p2": 2, "label": 3, "note": "n"}),
  ("b", {"p1": 4, "p2": 5, "label": 6, "note": "n"}),
  ("a", {"p1": 7, "p2": 8, "label": 9, "note": "n"}),
]
FIELDS = {"x": "p?", "y": "label"}


def stored(path, pairs=PAIRS, **options):
  import_store(path, {"train": examples(pairs)}, **options)
  return open_store(path)


def test_several_become_one(tmp_path):
  found = stored(tmp_path / "s", fields=FIELDS).train.examples
  assert {k: v.dtype for k, v in found.items()} == {"x": "int32", "y": "int32"}
  np.testing.assert_array_equal(found["x"], [[1, 2], [7, 8], [4, 5]])
  np.testing.assert_array_equal(found["y"], [3, 9, 6])


TABLE: dict[str, list[Any]] = {
  "client": ["a", "b", "a"],
  "mean 1": [1, 4, 7],
  "label": [3, 6, 9],
  "worst 1": [2, 5, 8],
}
KEPT = {k: TABLE[k] for k in ("mean 1", "label", "worst 1")}


def as_csv(file):
  rows = [TABLE, *zip(*TABLE.values(), strict=True)]
  file.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
  return importers.csv


def as_json_lines(file):
  rows = zip(*TABLE.values(), strict=True)
  lines = [json.dumps(dict(zip(TABLE, row, strict=True))) for row in rows]
  file.write_text("\n".join(lines))
  return importers.json_lines


def as_parquet(file):
  pq.write_table(pa.table(TABLE), file)
  return importers.parquet


def as_npz(file):
  with file.open("wb") as out:
    arrays: dict[str, Any] = {k: np.array(v) for k, v in TABLE.items()}
    np.savez(out, **arrays)
  return importers.npz


def as_datasets(file):
  datasets.Dataset.from_dict(TABLE).save_to_disk(file)
  return importers.datasets


def as_tff_hdf5(file):
  with h5py.File(file, "w") as out:
    for client, rows in {"a": [0, 2], "b": [1]}.items():
      for k, v in KEPT.items():
        out[f"examples/{client}/{k}"] = np.array(v)[rows]
  return lambda path, client, fields: importers.tff_hdf5(path, fields=fields)


def as_examples(file):
  pairs = [
    (client, {k: v[i] for k, v in KEPT.items()})
    for i, client in enumerate(TABLE["client"])
  ]
  del file
  return lambda path, client, fields: examples(pairs)


@pytest.mark.parametrize(
  "write",
  [
    as_csv,
    as_datasets,
    as_examples,
    as_json_lines,
    as_npz,
    as_parquet,
    as_tff_hdf5,
  ],
)
@pytest.mark.parametrize("pattern", ["*", "mean*+worst*"])
def test_no_label_is_among_the_inputs(tmp_path, write, pattern):
  """Against the table; in every format that has fields by name."""
  fields = {"x": pattern, "y": "label"}
  source = write(tmp_path / "a")(tmp_path / "a", client="client", fields=fields)
  given = fields if write is as_examples else None
  made_of = import_store(tmp_path / "s", {"train": source}, fields=given)
  found = open_store(tmp_path / "s").train.examples
  np.testing.assert_array_equal(found["x"], [[1, 2], [7, 8], [4, 5]])
  np.testing.assert_array_equal(found["y"], [3, 9, 6])
  assert made_of == {"x": ["mean 1", "worst 1"], "y": ["label"]}


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"y": "c", "x": "*"}, {"y": ["c"], "x": ["a1", "a2", "b", "d+e"]}),
    ({"x": "*", "y": "a*"}, {"x": ["b", "c", "d+e"], "y": ["a1", "a2"]}),
    ({"x": "c+b"}, {"x": ["c", "b"]}),
    ({"x": "a2+a*+a?"}, {"x": ["a2", "a1"]}),
    ({"x": "d+e+c"}, None),  # no "d", and no "e"
    ({"x": "d+e"}, {"x": ["d+e"]}),
    ({"x": "b", "y": "b"}, {"x": ["b"], "y": ["b"]}),
    ({"x": "b+*", "y": "c"}, {"x": ["b", "a1", "a2", "d+e"], "y": ["c"]}),
  ],
)
def test_which_field_takes_what(fields, expected):
  names = ["a1", "a2", "b", "c", "d+e"]
  if expected is None:
    with pytest.raises(ValueError, match="no field 'd'; there are a1, a2"):
      assigned("t", names, fields)
  else:
    assert assigned("t", names, fields) == expected


def test_a_map_sees_each_client(tmp_path):
  seen = []

  def double(client, held):
    seen.append(client)
    keep = held["label"] != 3
    return {"x": 0.5 * held["p1"][keep], "y": held["label"][keep]}

  pairs = [(c, {**e, "x": 0}) for c, e in PAIRS]
  data = stored(tmp_path / "s", pairs, map=double)
  assert seen == ["a", "b"]
  np.testing.assert_array_equal(data.train.examples["x"], [3.5, 2.0])
  assert data.train.examples["x"].dtype == np.float32


@pytest.mark.parametrize(
  ("dtype", "value", "told"),
  [
    ("uint8", 256, "holds 256, which is no uint8.*dtypes=x:int64"),
    ("uint8", -1, "holds -1, which is no uint8"),
    ("int32", 0.5, "holds 0.5, which is no int32.*dtypes=x:float32"),
    ("int32", float("nan"), "holds nan, which is no int32"),
    ("bool", 2, "holds 2, which is no bool"),
    (None, 2**31, "holds 2147483648, which is no int32"),
    ("int32", np.float32(2**31), "which is no int32"),
    ("int32", 2.0**31, "holds 2147483648.0, which is no int32"),
    ("int64", 2.0**63, "which is no int64"),
    ("float32", 2**24 + 1, "holds 16777217, which is no float32.*x:float64"),
    ("float16", 2049, "holds 2049, which is no float16"),
    (None, np.longdouble(1), "dtype='float128' is unknown"),
    ("float16", 1e6, "holds 1000000.0, which is no float16.*x:float64"),
    ("float16", 1e6 + 0.5, "field 'x' of .*client 'a', example 0 holds inf"),
    (None, 123456789.0, "holds 123456789.0, which is no float32"),
    ("object", 1, "dtypes: x='object' is unknown"),
  ],
)
def test_dtypes_that_do_not_fit(tmp_path, dtype, value, told):
  dtypes = {"x": dtype} if dtype else None
  with pytest.raises(ValueError, match=told):
    stored(tmp_path / "s", [("a", {"x": value})], dtypes=dtypes)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("given", "stored_as"),
  [
    (np.float64(0.1), "float32"),
    (np.float16(0.5), "float16"),
    (np.uint8(3), "uint8"),
    (np.uint32(3), "int32"),
    (np.int64(-3), "int32"),
    (np.bool_(True), "bool"),
  ],
)
def test_what_devices_compute_with(tmp_path, given, stored_as):
  data = stored(tmp_path / "s", [("a", {"x": given})])
  found = data.train.examples["x"]
  assert found.dtype == stored_as
  assert found[0] == given.astype(stored_as)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"fields": {"x": "q"}}, "no field 'q'; there are p1, p2, label, note"),
    ({"fields": {"y": "p1"}}, "the fields are y; name the model's input x"),
    (
      {"fields": {"x": "[pn]*"}},
      "'note', which is among those of x, holds .n. in entry 0, which is no",
    ),
    (
      {"fields": {"x": "p*", "y": "*1"}},
      "'p1' is in a pattern of x and in one of y; name it in one",
    ),
    (
      {"fields": {"x": "lab*", "y": "label"}},
      r"other fields take all that 'lab\*' finds, label; leave x out",
    ),
    ({"fields": FIELDS, "dtypes": {"z": "int8"}}, "dtypes: field='z' is unkn"),
    ({"fields": FIELDS, "prepare": "no"}, "prepare='no' is unknown"),
    ({"fields": FIELDS, "num_classes": 5}, "labels 'y' go from 3 to 9"),
    ({"fields": FIELDS, "map": lambda c, e: e["q"]}, "'a': map raised KeyErr"),
    ({"fields": FIELDS, "map": lambda c, e: {}}, "has fields of shape"),
    ({"fields": FIELDS, "map": lambda c, e: {"x": 3}}, "has fields of shape"),
    (
      {"fields": FIELDS, "map": lambda c, e: {"x": e["x"], c: e["x"]}},
      "client 'b': what map returns has fields",
    ),
  ],
)
def test_what_is_refused(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    stored(tmp_path / "s", **options)
  assert not any(tmp_path.iterdir())


def test_no_train(tmp_path):
  with pytest.raises(ValueError, match="no source of the split 'train'"):
    import_store(tmp_path / "s", {"seen": examples(PAIRS)})
