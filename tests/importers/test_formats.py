"""Every importer, on files that another library has written.

`pytest -m slow -s tests/importers/test_formats.py` tells rows and users of real
data in every format.
"""

import csv
import gzip
import json
import re
import sqlite3
import sys
import zipfile
import zlib
from contextlib import nullcontext
from typing import Any

import datasets as hub
import h5py
import msgpack
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import writers

from fedjax_sim.data import importers, load_leaf_json, open_store, verify
from fedjax_sim.data.importers import blocks, import_store

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (40, 3, 2), np.uint8)
Y = RNG.integers(0, 5, 40).astype(np.int64)
OWNER = np.array([f"user {i} é" for i in RNG.integers(0, 6, 40)])
DTYPES = {"x": "uint8", "y": "uint8"}


def stored(source, path, **options):
  import_store(path, {"train": source}, **options)
  verify(path)
  return open_store(path)


def same(data, x, y, owner, by_name=False):
  """Whether the clients and their examples, in order, are those."""
  names = [data.client_name(i) for i in range(data.num_clients)]
  expected = list(dict.fromkeys(owner))
  assert names == (sorted(expected) if by_name else expected)
  for i, name in enumerate(names):
    found = data.client(i)
    np.testing.assert_array_equal(
      found["x"].reshape(len(found["x"]), -1),
      x[owner == name].reshape((owner == name).sum(), -1),
    )
    np.testing.assert_array_equal(found["y"], y[owner == name])


@pytest.mark.parametrize("block", [256, 2**24])
@pytest.mark.parametrize("format", writers.WRITERS)
def test_what_others_write(tmp_path, monkeypatch, format, block):
  monkeypatch.setattr(blocks, "BLOCK", block)
  name, _, write, apart = writers.WRITERS[format]
  order = np.arange(40) if apart else np.argsort(OWNER, kind="stable")
  x, y, owner = X[order], Y[order], OWNER[order]
  data = stored(
    write(tmp_path / name, x, y, owner), tmp_path / "s", dtypes=DTYPES
  )
  same(data.train, x, y, owner)
  assert data.num_classes == y.max() + 1
  assert data.train.examples["x"].dtype == np.uint8


@pytest.mark.slow
@pytest.mark.parametrize("format", writers.WRITERS)
def test_real_digits(tmp_path, data_folder, format):
  with np.load(data_folder / "mnist_writers" / "mnist_100writers.npz") as held:
    x, y = held["train_x"], held["train_y"].astype(np.int64)
    owner = held["train_writer"].astype(str)
  name, library, write, _ = writers.WRITERS[format]
  data = stored(
    write(tmp_path / name, x, y, owner), tmp_path / "s", dtypes=DTYPES
  )
  # HDF5 has its groups by name.
  same(data.train, x, y, owner, by_name=format == "tff_hdf5")
  rows, users = data.train.num_examples, data.train.num_clients
  print(f"| `{format}` | {library} | {rows:,} | {users} |")


def test_the_same_as_the_loader_of_leaf(tmp_path):
  """Text: one store and one data set in memory of the same file."""
  texts = {"a": ["To be, or not", "to be"], "b": ["x"], "c": ["that is"]}
  held = {
    "users": list(texts),
    "num_samples": [len(t) for t in texts.values()],
    "user_data": {name: {"x": text} for name, text in texts.items()},
  }
  file = tmp_path / "a.json"
  file.write_text(json.dumps(held))
  loaded = load_leaf_json(path=file, sequence_length=7)
  data = stored(
    importers.leaf_json(file),
    tmp_path / "s",
    text="characters",
    sequence_length=7,
  )
  assert data.num_classes == loaded.num_classes
  assert data.prepare is loaded.prepare
  assert data.train.num_clients == 2  # one character has no next one
  for field, values in loaded.train.examples.items():
    np.testing.assert_array_equal(data.train.examples[field], values)


def test_bytes_as_tff_writes_text(tmp_path):
  with h5py.File(tmp_path / "a.h5", "w") as out:
    out["examples/a/tokens"] = [b"the cat sat", b"the dog"]
    out["examples/b/tokens"] = ["the cat"]
  data = stored(
    importers.tff_hdf5(tmp_path / "a.h5"),
    tmp_path / "s",
    fields={"x": "tokens"},
    text="words",
    sequence_length=4,
    vocabulary_size=2,
  )
  # cat is 5, the 4; begin 2, end 3, unknown 1
  assert data.num_classes == 6
  x = [[2, 4, 5, 1], [2, 4, 1, 0], [2, 4, 5, 0]]
  np.testing.assert_array_equal(data.train.examples["x"], x)
  y = [[4, 5, 1, 3], [4, 1, 3, 0], [4, 5, 3, 0]]
  np.testing.assert_array_equal(data.train.examples["y"], y)


def test_images_of_datasets(tmp_path):
  x = RNG.integers(0, 256, (5, 8, 6), np.uint8)
  features = hub.Features(image=hub.Image(), user=hub.Value("int64"))
  held = hub.Dataset.from_dict(
    {"image": list(x), "user": [3, 1, 3, 1, 1]}, features=features
  )
  held.save_to_disk(tmp_path / "saved")
  source = importers.datasets(
    tmp_path / "saved", client="user", fields={"x": "image"}
  )
  data = stored(source, tmp_path / "s")
  assert [data.train.client_name(i) for i in range(2)] == ["3", "1"]
  np.testing.assert_array_equal(data.train.examples["x"], x[[0, 2, 1, 3, 4]])


def test_a_folder_of_files_and_every_split(tmp_path):
  for i in range(2):
    rows = slice(20 * i, 20 * (i + 1))
    pq.write_table(
      writers.table(X[rows], Y[rows], OWNER[rows]), tmp_path / f"{i}.parquet"
    )
  source = importers.parquet(tmp_path, client="user")
  import_store(
    tmp_path / "s",
    {"test": source, "seen": source, "train": source},
    dtypes=DTYPES,
  )
  data = open_store(tmp_path / "s")
  same(data.train, X, Y, OWNER)
  same(data.seen, X, Y, OWNER)
  assert data.test is not None
  assert data.test["x"].shape == X.shape


# --- what is refused ----------------------------------------------------------


def changed(held, *path, to):
  held = json.loads(json.dumps(held))
  part = held
  for key in path[:-1]:
    part = part[key]
  if to is None:
    del part[path[-1]]
  else:
    part[path[-1]] = to
  return held


LEAF = {
  "users": ["a", "b"],
  "num_samples": [2, 1],
  "user_data": {
    "a": {"x": [[1], [2]], "y": [0, 1]},
    "b": {"x": [[3]], "y": [1]},
  },
}
TWICE = json.dumps(LEAF).replace('"b": {"x"', '"a": {"x"')


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      json.dumps(LEAF)[:60],
      r"cannot be read as JSON|num_samples: expected a JSON",
    ),
    (changed(LEAF, "users", to=None), "users: expected a JSON array"),
    (changed(LEAF, "users", to=["a", "a"]), "user 'a' is twice in users"),
    (changed(LEAF, "users", to=["a", 3]), "user 3: expected a name"),
    (changed(LEAF, "num_samples", to=[2]), "num_samples: expected 2, one a"),
    (
      changed(
        changed(LEAF, "user_data", "b", "y", to=None), "num_samples", to=[2, 2]
      ),
      "'b': num_samples is 2; expected 1",
    ),
    (changed(LEAF, "user_data", "b", to=None), "user 'b': expected an object"),
    (
      changed(LEAF, "user_data", "c", to={}),
      "user 'c' is in user_data, but not",
    ),
    (TWICE, "user 'a' is in user_data, but not in users, or is there twice"),
    (
      changed(LEAF, "user_data", "a", "y", to=[0]),
      "y has 1 entries; expected 2",
    ),
    (
      changed(LEAF, "user_data", "a", "x", to=[[1], [2, 3]]),
      "user 'a': x: expected entries of one shape",
    ),
    (
      changed(LEAF, "user_data", "a", "x", to=["q", 1]),
      "user 'a': x: expected text, as others are, found 1",
    ),
    (changed(LEAF, "user_data", "b", "x", to=["q"]), "field 'x' holds text"),
    (
      {**LEAF, "user_data_label": {"z": [1]}},
      "user 'z' is in user_data_label, but not in user_data",
    ),
  ],
)
def test_wrong_json(tmp_path, text, message):
  file = tmp_path / "a.json"
  file.write_text(text if isinstance(text, str) else json.dumps(text))
  refused(importers.leaf_json(file), tmp_path, message)


def refused(source, tmp_path, message, error=ValueError, **options):
  """Whether nothing is written, and the message names the file."""
  before = sorted(tmp_path.iterdir())
  with pytest.raises(error, match=message) as caught:
    import_store(tmp_path / "s", {"train": source}, **options)
  assert sorted(tmp_path.iterdir()) == before
  return str(caught.value)


def test_a_user_without_examples_is_left_out(tmp_path):
  held = changed(LEAF, "user_data", "b", to={"x": [], "y": []})
  held["num_samples"] = [2, 0]
  (tmp_path / "a.json").write_text(json.dumps(held))
  (tmp_path / ".b.json").write_text("not read")
  (tmp_path / "c.json").mkdir()
  with pytest.warns(UserWarning, match="'b': there are no examples"):
    data = stored(importers.leaf_json(tmp_path), tmp_path / "s")
  assert [data.train.client_name(i) for i in range(1)] == ["a"]
  assert data.train.num_clients == 1


def test_clients_that_never_train(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps(LEAF))
  source = importers.leaf_json(tmp_path / "a.json")
  with pytest.raises(ValueError, match="'a' is among those that train"):
    import_store(tmp_path / "s", {"train": source, "unseen": source})
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, "labels 'y' go down to -1; give labels from 0 on, or num_classes=0"),
    ({"num_classes": 0, "prepare": "bytes"}, "is for x from 0 to 255, uint8"),
  ],
)
def test_what_a_model_could_not_use(tmp_path, options, message):
  pairs = [("a", {"x": 0.5, "y": -1}), ("b", {"x": 0.5, "y": 1})]
  refused(importers.examples(pairs), tmp_path, message, **options)


def test_a_user_in_two_files(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.json").write_text(json.dumps(LEAF))
  message = r"b.json: client 'a' is there twice"
  refused(importers.leaf_json(tmp_path), tmp_path, message)


def test_a_truncated_gzip(tmp_path):
  file = tmp_path / "a.json.gz"
  file.write_bytes(gzip.compress(json.dumps(LEAF).encode())[:-20])
  refused(importers.leaf_json(file), tmp_path, "cannot be read as JSON")


def hdf5(tmp_path, **held):
  with h5py.File(tmp_path / "a.h5", "w") as out:
    for name, values in held.items():
      out[name.replace("__", "/")] = values
  return tmp_path / "a.h5"


@pytest.mark.parametrize(
  ("held", "message"),
  [
    ({"other": [1]}, "examples: expected a group, found nothing"),
    ({"examples": [1]}, "examples: expected a group, found a Dataset"),
    ({"examples__a": [1]}, "client 'a': a: expected a group, found a Dataset"),
    ({"examples__a__x": 3.0}, "client 'a': x: expected an array"),
    ({"examples__a__x": [1j]}, "client 'a': x: expected numbers or text"),
    (
      {"examples__a__x": [1, 2], "examples__a__y": [1]},
      "field 'x' has 2 examples, field 'y' 1",
    ),
    ({"examples__a__z": [1]}, "the fields are z; name the model's input x"),
    ({"examples__a__x": [1.0, np.nan]}, "client 'a', example 1 holds nan"),
    ({"examples__a__x": [2**40]}, "holds 1099511627776, which is no int32"),
  ],
)
def test_wrong_tff_hdf5(tmp_path, held, message):
  file = hdf5(tmp_path, **held)
  assert str(file) in refused(importers.tff_hdf5(file), tmp_path, message)


def test_hdf5_does_not_read_other_files(tmp_path):
  secret = tmp_path / "secret"
  secret.write_bytes(bytes(16))
  with h5py.File(tmp_path / "other.h5", "w") as out:
    out["x"] = [1]
  with h5py.File(tmp_path / "a.h5", "w") as out:
    out.create_group("examples/a").create_dataset(
      "x", (2,), np.int64, external=[(str(secret), 0, 16)]
    )
  source = importers.tff_hdf5(tmp_path / "a.h5")
  refused(source, tmp_path, "its values are in another file")
  for link in (h5py.ExternalLink("other.h5", "x"), h5py.SoftLink("/out/x")):
    with h5py.File(tmp_path / "a.h5", "w") as out:
      out["out"] = h5py.ExternalLink("other.h5", "/")
      out["examples/a/x"] = link
    refused(source, tmp_path, "leads elsewhere, perhaps to another file")
  with h5py.File(tmp_path / "a.h5", "w") as out:
    out["out"] = h5py.ExternalLink("other.h5", "/")
    out["users"], out["num_samples"] = ["/out"], [1]
    out.create_group("user_data")
  source = importers.flute_hdf5(tmp_path / "a.h5")
  refused(source, tmp_path, "leads elsewhere, perhaps to another file")


def test_hdf5_that_claims_more_than_it_has(tmp_path):
  for chunks in (None, (10,)):
    with h5py.File(tmp_path / "a.h5", "w") as out:
      out.create_dataset("examples/a/x", (10**12,), np.uint8, chunks=chunks)
    source = importers.tff_hdf5(tmp_path / "a.h5")
    refused(source, tmp_path, "'a': x: expected [0-9,]+ (bytes|chunks), and")


def test_only_the_fields_that_are_asked_for(tmp_path):
  file = hdf5(tmp_path, examples__a__x=[1], examples__a__z=[1j])
  source = importers.tff_hdf5(file, fields={"x": "x"})
  assert list(stored(source, tmp_path / "s").train.examples) == ["x"]


@pytest.mark.parametrize(
  ("held", "message"),
  [
    ({"users": ["a"], "num_samples": [1.5]}, "expected whole numbers, one a"),
    ({"users": ["a", "b"], "num_samples": [1]}, "expected 2, one a user, fou"),
    ({"users": ["a"], "num_samples": [2]}, "'a': num_samples is 2; expected 1"),
    ({"users": ["b"], "num_samples": [1]}, "user 'a' has examples or labels"),
    ({"users": ["a", "a"], "num_samples": [1, 1]}, "every user once"),
    ({"num_samples": [1]}, "users: expected an array"),
  ],
)
def test_wrong_flute_hdf5(tmp_path, held, message):
  file = hdf5(tmp_path, user_data__a__x=[[1.0]], **held)
  refused(importers.flute_hdf5(file), tmp_path, message)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ((b"a", b"junk", 1), "client b'a': data is no zlib-compressed msgpack"),
    ((b"\xff", b"", 1), "has a name that is no UTF-8"),
    ((7, b"", 1), "expected client_id and data of bytes"),
  ],
)
def test_wrong_sqlite(tmp_path, row, message):
  file = tmp_path / "a.sqlite"
  connection = sqlite3.connect(file)
  connection.execute(
    "CREATE TABLE federated_data (client_id, data, num_examples)"
  )
  connection.execute("INSERT INTO federated_data VALUES (?, ?, ?)", row)
  connection.commit()
  connection.close()
  refused(importers.fedjax_sqlite(file), tmp_path, message)


def test_sqlite_whose_dtype_is_none(tmp_path):
  for dtype in (7, "(1,", "O"):
    array = msgpack.packb(((1,), dtype, b"1"))
    data = msgpack.packb({"x": msgpack.ExtType(1, array)})
    test_wrong_sqlite(
      tmp_path,
      (b"a", zlib.compress(data), 1),
      "client b'a': data is no zlib-compressed msgpack of arrays",
    )
    (tmp_path / "a.sqlite").unlink()


def test_sqlite_that_is_not_finished(tmp_path):
  file = tmp_path / "a.sqlite"
  writers.fedjax_sqlite(file, X, Y, OWNER)
  (tmp_path / "a.sqlite-wal").write_bytes(b"more")
  message = "is not all of it: a.sqlite-wal has what was not written"
  refused(importers.fedjax_sqlite(file), tmp_path, message)


def test_a_link_to_sqlite_that_is_not_finished(tmp_path):
  (tmp_path / "real").mkdir()
  writers.fedjax_sqlite(tmp_path / "real" / "a.db", X, Y, OWNER)
  (tmp_path / "real" / "a.db-wal").write_bytes(b"more")
  (tmp_path / "link.db").symlink_to(tmp_path / "real" / "a.db")
  source = importers.fedjax_sqlite(tmp_path / "link.db")
  refused(source, tmp_path, "is not all of it")


def test_sqlite_of_something_else(tmp_path):
  sqlite3.connect(tmp_path / "a.sqlite").close()
  message = "cannot be read as SQLite: no such table: federated_data"
  refused(importers.fedjax_sqlite(tmp_path / "a.sqlite"), tmp_path, message)


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"x": [1.0]}, "there is no column 'user' to name the client; there are x"),
    ({"user": [None, "b"], "x": [1, 2]}, "row 0: user, which names the client"),
    ({"user": [0.5], "x": [1]}, "row 0: user, which names the client, is 0.5"),
    ({"user": ["a"] * 3, "x": [1, None, 2]}, "column 'x': row 1 has no value"),
    ({"user": ["a"] * 2, "x": [[1], [1, 2]]}, "row 1 has 2 entries, others 1"),
    (
      {"user": ["a"] * 3, "x": [[1, 2], [3, 4], [5, None]]},
      "column 'x': row 2, entry 1 of its lists, has no value",
    ),
    (
      {"user": ["a"] * 2, "x": [[[1, 2], [3, 4]], [[5, 6], [7]]]},
      "column 'x': row 1, entry 1 of its lists, has 1 entries, others 2",
    ),
    (
      {"user": ["a"] * 2, "x": [[[1, 2], [3, 4]], [[5, 6], [None, 8]]]},
      "column 'x': row 1, entry 2 of its lists, has no value",
    ),
    (
      {"user": ["a"], "x": [{"b": 1}]},
      "expected numbers or text, found struct",
    ),
    ({"user": ["a"], "z": [1]}, "the fields are z; name the model's input x"),
  ],
)
def test_wrong_parquet(tmp_path, columns, message):
  """Rows count from 0."""
  pq.write_table(pa.table(columns), tmp_path / "a.parquet")
  source = importers.parquet(tmp_path / "a.parquet", client="user")
  refused(source, tmp_path, message)


def test_the_row_of_a_null_in_a_long_file(tmp_path, monkeypatch):
  """Of several blocks; the row is known, as it was put there."""
  monkeypatch.setattr(blocks, "BLOCK", 256)
  x: list[Any] = [[float(i), 1.0] for i in range(1000)]
  x[700][1] = None
  pq.write_table(
    pa.table({"user": ["a"] * 1000, "x": x}), tmp_path / "a.parquet"
  )
  source = importers.parquet(tmp_path / "a.parquet", client="user")
  refused(source, tmp_path, "row 700, entry 1 of its lists, has no value")


def test_text_as_polars_has_it(tmp_path):
  users = pa.array(["a", "b", "a"], pa.string_view())
  texts = pa.array(["one two", "three", "two"], pa.string_view())
  cents = pa.array([100, 250, 5], pa.decimal128(5, 2))
  table = pa.table({"user": users, "x": texts, "y": cents})
  pq.write_table(table, tmp_path / "a.parquet")
  [block] = importers.parquet(tmp_path / "a.parquet", client="user")
  assert list(block.names) == ["a", "b"]
  assert block.examples["x"].tolist() == ["one two", "two", "three"]
  assert block.examples["y"].tolist() == [100.0, 5.0, 250.0]


@pytest.mark.parametrize(
  ("text", "options", "x", "told"),
  [
    ("user,x1,x2\na,1.5,2\n", {}, [1.5, 2], None),
    ("user;x1;x2\na;1,5;2\n", {}, [1.5, 2], "by ';', and .* with ','"),
    ("user;x1;x2\na;1.5;2\n", {}, [1.5, 2], r"by ';', and .* with '\.'"),
    ("user\tx1\tx2\na\t-1,5\t2e1\n", {}, [-1.5, 20], r"by '\\t', and .* ','"),
    ("user|x1|x2\na|0,125|2\n", {}, [0.125, 2], r"by '\|', and .* with ','"),
    ('user,x1,x2\na,"1,5",2\n', {"decimal": ","}, [1.5, 2], None),
    (
      "user;x1;x2\na;1,500;2\n",
      {"delimiter": ";", "decimal": ","},
      [1.5, 2],
      None,
    ),
    ("user;x1;x2\na;1,500;2\n", {}, "'1,500' may be a fraction or whole", None),
    ("user;x1\na;1\n", {"delimiter": ","}, "no column 'user' to name", None),
    (
      "user,x1\na,1\n",
      {"delimiter": ";;"},
      "delimiter=';;' is no single",
      None,
    ),
    ("user,x1\na,1\n", {"decimal": ";"}, "decimal=';' is neither", None),
  ],
)
def test_how_a_csv_is_separated(tmp_path, text, options, x, told):
  file = tmp_path / "a.csv"
  file.write_text(text)
  source = importers.csv(file, client="user", fields={"x": "x*"}, **options)
  if isinstance(x, str):
    refused(source, tmp_path, x)
    return
  with pytest.warns(UserWarning, match=told) if told else nullcontext():
    [block] = source
  assert block.examples["x"].tolist() == [x]


@pytest.mark.parametrize("fields", [{"x": "x?"}, {"x": "x2"}])
def test_a_question_mark_in_a_csv(tmp_path, fields):
  """One, among numbers; the column, the row and the client are told."""
  rows = [f"u{i % 2},{i},{'?' if i == 5 else i}\n" for i in range(8)]
  (tmp_path / "a.csv").write_text("user,x1,x2\n" + "".join(rows))
  source = importers.csv(tmp_path / "a.csv", client="user", fields=fields)
  told = refused(source, tmp_path, r"'x2'.* '\?' in row 5")
  assert "'x1'" not in told


def test_fractions_that_come_late(tmp_path):
  """Of sources that can be read again, float32; of others, refused."""
  pairs: list[Any] = [("a", {"x": 1, "y": 0}), ("b", {"x": 0.5, "y": 1})]
  source = [next(iter(importers.examples([pair]))) for pair in pairs]
  message = "field 'x' is float32, and int32 before; give it one"
  refused(iter(source), tmp_path, message)
  data = stored(source, tmp_path / "s")
  assert data.train.examples["x"].tolist() == [1, 0.5]
  assert {k: v.dtype.name for k, v in data.train.examples.items()} == {
    "x": "float32",
    "y": "int32",
  }
  pairs[0][1]["x"] = 2**24 + 1
  source = [next(iter(importers.examples([pair]))) for pair in pairs]
  with pytest.raises(ValueError, match="holds 16777217, which is no float32"):
    import_store(tmp_path / "t", {"train": source})


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("user,x\na,1\nb\n", "cannot be read as CSV"),
    ("user,x\na,b\n", "field 'x' holds text"),
    ("user,x\na,1\n,2\n", "row 1: user, which names the client, is ''"),
    ("user,x\na,\n", "column 'x': row 0 has no value"),
    ("user,x,x\na,1,2\n", "there are several columns 'x'"),
    ("user,x\na,inf\n", "client 'a', example 0 holds inf"),
    ("", "cannot be read as CSV"),
    ("user,y\na,1\n", "there is no field 'x'; there are y"),
  ],
)
def test_wrong_csv(tmp_path, text, message):
  file = tmp_path / "a.csv"
  file.write_text(text)
  source = importers.csv(file, client="user", fields={"x": "x"})
  refused(source, tmp_path, message)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"user": 1, "x": 1}\n{"user"', "line 2 is no JSON"),
    ('{"user": 1, "x": 1}\n\n[1]', "line 3: expected an object, found a list"),
    ('{"user": true, "x": 1}', "line 1: user, which names the client, is True"),
    ('{"user": 1, "x": 1}\n{"user": 1}', "line 2: x is missing"),
    (
      '{"user": 1, "x": 1}\n{"user": 1, "x": 1, "y": 2}',
      "line 2 has 'y', line",
    ),
    ('{"x": 1}', "line 1: there is no column 'user'"),
    ('{"user": 1, "x": NaN}', "client '1', example 0 holds nan"),
    (
      '{"user": 1, "x": [1, 2]}\n{"user": 1, "x": [3, null]}',
      r"from line 1 on: x: expected numbers.* as of entry 1, \[3, None\]",
    ),
    ('{"user": 1, "x": 99999999999999999999}', "x: expected numbers"),
    ("", "there is no client with examples"),
  ],
)
def test_wrong_json_lines(tmp_path, text, message):
  file = tmp_path / "a.jsonl"
  file.write_text(text)
  refused(importers.json_lines(file, client="user"), tmp_path, message)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"x": X}, "there is no column 'client' to name the client"),
    (
      {"x": X, "client": OWNER[:3]},
      r"array 'x' has shape \(40, 3, 2\), and 'client' \(3,\); give each",
    ),
    ({"x": X[0, 0, 0], "client": OWNER}, r"array 'x' has shape \(\), and 'cl"),
    ({"x": X + 1j, "client": OWNER}, "field 'x' holds complex"),
    (
      {"x": X, "client": np.array([None] * 40)},
      "array 'client' has dtype object; give numbers, or text, that need no",
    ),
    ({"x": X, "client": X}, "array 'client' has shape"),
    ({"x": X, "client": np.zeros(40)}, "row 0: client, which names"),
  ],
)
def test_wrong_npz(tmp_path, arrays, message):
  np.savez(tmp_path / "a.npz", **arrays)
  refused(importers.npz(tmp_path / "a.npz"), tmp_path, message)


def test_a_damaged_header_of_npz(tmp_path):
  np.savez(tmp_path / "a.npz", x=X, client=OWNER)
  with zipfile.ZipFile(tmp_path / "a.npz") as held:
    members = {name: held.read(name) for name in held.namelist()}
  for old in (b"(40, 3, 2)", b"'descr'", b"}"):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
      for name, data in members.items():
        out.writestr(name, data.replace(old, b"(" * len(old), 1))
    message = re.escape(f"{tmp_path / 'a.npz'} cannot be read as .npz")
    refused(importers.npz(tmp_path / "a.npz"), tmp_path, message)


def test_parquet_in_blocks_by_what_it_takes_in_memory(tmp_path, monkeypatch):
  x = np.zeros((3000, 784), np.uint8)  # next to nothing in the file
  pq.write_table(
    writers.table(x, np.zeros(3000, int), np.repeat("a", 3000)),
    tmp_path / "a.parquet",
  )
  monkeypatch.setattr(blocks, "BLOCK", 2**16)
  source = importers.parquet(tmp_path / "a.parquet", client="user")
  assert max(len(block.examples["x"]) for block in source) <= 2**16 // 784


def test_damage_of_a_client_names_it_and_the_field(tmp_path):
  x = np.arange(4000)
  with h5py.File(tmp_path / "a.h5", "w") as out:
    out["examples/one/x"] = x
    out.create_dataset("examples/two/x", data=x, compression="gzip")
    place, size = out["examples/two/x"].id.get_chunk_info(0)[2:]
  data = bytearray((tmp_path / "a.h5").read_bytes())
  data[place + 50 : place + size] = bytes(size - 50)
  (tmp_path / "a.h5").write_bytes(data)
  source = importers.tff_hdf5(tmp_path / "a.h5")
  refused(source, tmp_path, "client 'two': x cannot be read as HDF5")


@pytest.mark.parametrize(
  ("text", "fields", "found"),
  [
    ("client,c1,c2\n7,1,2\n8,3,4.5\n", {"x": "c*"}, [[1, 2], [3, 4.5]]),
    ("client,x\n7,true\n8,false\n", None, [1, 0]),
    ("client,x[0]\n7,1\n8,1.5\n", {"x": "x[0]"}, [1, 1.5]),
    ("client,x\n7,1.5\n8,1\n", None, [1.5, 1]),
    ("client,x\n7,9007199254740993\n8,1\n", None, "not every whole number"),
    ("client,x\n7,a\n8,b\n", None, "field 'x' holds text"),
  ],
)
def test_csv_whose_dtypes_are_told(tmp_path, text, fields, found):
  file = tmp_path / "a.csv"
  file.write_text(text)
  dtypes = {"x": "float64", "of_a_map": "uint8"}
  source = importers.csv(file, client="client", fields=fields, dtypes=dtypes)
  if isinstance(found, str):
    refused(source, tmp_path, found)
    return
  data = stored(source, tmp_path / "s", dtypes={"x": "float64"}).train
  np.testing.assert_array_equal(data.examples["x"], found)
  assert [data.client_name(i) for i in range(2)] == ["7", "8"]


def test_csv_with_line_breaks_in_quotes(tmp_path, monkeypatch):
  monkeypatch.setattr(blocks, "BLOCK", 64)
  texts = [f"one\n{i}\n\ntwo" for i in range(50)]
  with (tmp_path / "a.csv").open("w", newline="") as out:
    csv.writer(out).writerows([("user", "x"), *((1, text) for text in texts)])
  source = importers.csv(tmp_path / "a.csv", client="user")
  assert [t for b in source for t in b.examples["x"].tolist()] == texts


def test_images_with_a_palette(tmp_path):
  image = PIL.Image.new("RGB", (4, 2), (10, 200, 30)).convert("P")
  features = hub.Features(image=hub.Image(), user=hub.Value("int64"))
  held = hub.Dataset.from_dict({"image": [image], "user": [1]}, features)
  held.save_to_disk(tmp_path / "saved")
  source = importers.datasets(
    tmp_path / "saved", client="user", fields={"x": "image"}
  )
  [block] = source
  assert block.examples["x"].shape == (1, 2, 4, 3)


def test_wrong_examples(tmp_path):
  given: Any = {"x": 1.0}
  pairs: Any
  for pairs, error, message in (
    ([("a", given), "b"], TypeError, "example 1 is a str; give a client"),
    ([("a", 3)], TypeError, "example 0"),
    (
      [(None, given)],
      ValueError,
      "the client, which names the client, is None",
    ),
    (
      [("a", given), ("a", {"y": 1})],
      ValueError,
      r"example 1 has fields \['y'",
    ),
    ([("a", given), ("a", {"x": [1]})], ValueError, "entries of one shape"),
  ):
    refused(importers.examples(pairs), tmp_path, message, error)


def test_wrong_datasets(tmp_path):
  (tmp_path / "empty").mkdir()
  source = importers.datasets(tmp_path / "empty", client="user")
  refused(source, tmp_path, "cannot be read as a data set")
  pq.write_table(pa.table({"user": [1]}), tmp_path / "empty" / "train.parquet")
  source = importers.datasets(
    tmp_path / "empty", client="user", split="validation"
  )
  refused(source, tmp_path, "validation")


def test_a_saved_data_set_of_another_split(tmp_path):
  writers.saved_dataset(tmp_path / "saved", X, Y, OWNER)
  source = importers.datasets(tmp_path / "saved", client="user", split="test")
  refused(source, tmp_path, "the folder is of one split, 'train'")
  (tmp_path / "a.parquet").write_bytes(b"")
  source = importers.datasets(tmp_path / "a.parquet", client="user")
  refused(source, tmp_path, "that is a file; give its folder")


def test_no_file(tmp_path):
  refused(
    importers.leaf_json(tmp_path / "no"),
    tmp_path,
    "There is no",
    FileNotFoundError,
  )
  refused(
    importers.leaf_json(tmp_path),
    tmp_path,
    "holds no .json or .json.gz",
    FileNotFoundError,
  )


def test_without_the_library(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "h5py", None)
  refused(
    importers.tff_hdf5(tmp_path),
    tmp_path,
    r"needs h5py, which is not installed: pip install 'fedjax_sim\[hdf5\]'",
    ModuleNotFoundError,
  )
