"""Client stores: what is written is read, and what is damaged is refused."""

import contextlib
import errno
import json
import os
import pathlib
import re
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_sim.config import flags
from fedjax_sim.config.build import build
from fedjax_sim.data import (
  FederatedData,
  StoredData,
  StoreError,
  StoreWriter,
  load_digits,
  load_store,
  open_store,
  verify,
)
from fedjax_sim.data.store import column as columns
from fedjax_sim.data.store import format
from fedjax_sim.run import experiment
from test_features import DIGITS

FIXTURE = settings(
  deadline=None,
  max_examples=40,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def examples_of(count, first=0):
  rows = np.arange(first, first + count)
  x = (rows[:, None] + np.arange(3)).astype(np.float32)
  return {"x": x, "y": (rows % 4).astype(np.int32)}


def write(path, blocks, **options):
  with StoreWriter(path, **options) as store:
    for names, sizes, examples in blocks:
      store.split("train").append(names, sizes, examples)


def write_dataset(path, data, prepare="stored", order=None):
  """A data set in memory as a store, a client a block."""
  with StoreWriter(
    path, prepare=prepare, num_classes=data.num_classes
  ) as store:
    for name in ("train", "unseen"):
      part, split = getattr(data, name), store.split(name)
      for i in range(part.num_clients) if order is None else order:
        client = part.client(i)
        split.append([part.client_name(i)], [len(client["y"])], client)
    test = store.split("test")
    test.append(["test"], [len(data.test["y"])], data.test)


@FIXTURE
@given(
  pieces=st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=4),
    max_size=6,
  ),
  chunk=st.sampled_from([1, 40, 10**6]),
)
def test_examples_come_back_by_client(pieces, chunk, tmp_path_factory):
  """Clients in any order, again and again, as if sorted in memory."""
  path = tmp_path_factory.mktemp("store") / "made"
  expected: dict[str, list[int]] = {}
  blocks, first = [], 0
  for piece in pieces:
    piece = list(dict(piece).items())  # each client once a block
    sizes = [size for _, size in piece]
    for client, size in piece:
      if size:
        rows = expected.setdefault(f"ä{client}", [])
        rows.extend(range(first, first + size))
        first += size
    total = sum(sizes)
    names = [f"ä{client}" for client, _ in piece]
    blocks.append((names, sizes, examples_of(total, first - total)))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(columns, "CHUNK", chunk)
    patch.setattr(columns, "BLOCK", 64)
    if not expected:
      with pytest.raises(ValueError, match="no client with examples"):
        write(path, blocks)
      assert not list(path.parent.iterdir())
      return
    write(path, blocks)
    verify(path)
  data = open_store(path).train
  assert list(data.names or ()) == list(expected)
  for i, rows in enumerate(expected.values()):
    client = data.client(i)
    np.testing.assert_array_equal(client["x"][:, 0], rows)
    np.testing.assert_array_equal(client["y"], np.array(rows) % 4)


def test_a_store_is_its_data_set(tmp_path):
  data = load_digits(num_clients=20, unseen_clients=4)
  write_dataset(tmp_path / "digits", data)
  found = open_store(tmp_path / "digits")
  assert data.unseen is not None
  assert found.unseen is not None
  assert data.test is not None
  assert found.test is not None
  assert found.num_classes == data.num_classes
  assert found.example_shape == data.example_shape
  assert isinstance(found.train, StoredData)
  assert isinstance(found.train.examples["x"], np.memmap)
  for one, other in ((data.train, found.train), (data.unseen, found.unseen)):
    np.testing.assert_array_equal(one.offsets, other.offsets)
    for field, values in one.examples.items():
      np.testing.assert_array_equal(values, other.examples[field])
  np.testing.assert_array_equal(data.test["x"], found.test["x"])
  again = tmp_path / "again"
  write_dataset(again, data)
  twin = open_store(again).train
  assert isinstance(twin, StoredData)
  assert twin.digest == found.train.digest


def test_splits_of_a_store_in_memory(tmp_path):
  write(tmp_path / "s", [("abcde", [4] * 5, examples_of(20))])
  data = load_store(path=tmp_path / "s", heldout_fraction=0.5, unseen_clients=1)
  assert data.train.num_clients == 4
  assert data.seen is not None
  assert data.unseen is not None
  assert data.seen.num_examples == data.train.num_examples == 8
  assert data.unseen.num_examples == 4
  assert not isinstance(data.train, StoredData)


def test_seen_has_the_clients_of_train(tmp_path):
  with StoreWriter(tmp_path / "s") as store:
    store.split("train").append("abc", [1, 2, 3], examples_of(6))
    store.split("seen").append("ca", [2, 1], examples_of(3))
  data = open_store(tmp_path / "s")
  assert data.seen is not None
  assert data.seen.sizes.tolist() == [1, 0, 2]
  assert list(data.seen.names or ()) == ["a", "b", "c"]
  assert data.train.names == data.seen.names
  with pytest.raises(ValueError, match="seen.*has split already"):
    load_store(path=tmp_path / "s", heldout_fraction=0.5)


OBJECTS = {"x": np.array([None, 1], object)}


@pytest.mark.parametrize(
  ("blocks", "message"),
  [
    ([("ab", [1, 1], examples_of(3))], r"train: sizes add up to 2.*3 examples"),
    ([("ab", [1], examples_of(1))], r"sizes has shape \(1,\) for 2 clients"),
    (
      [("ab", [1, 1], {"x": np.array([[1.0], [np.nan]])})],
      r"field 'x' of .*train: client 'b', example 0 holds nan",
    ),
    ([("ab", [1, 1], OBJECTS)], r"field 'x' has dtype object.*unpickling"),
    (
      [("ab", [1, 1], {"x": np.array(["1", "2"])})],
      r"field 'x' has dtype <U1; give native",
    ),
    (
      [("ab", [1, 1], {"../x": np.zeros(2)})],
      r"field '\.\./x' cannot name a file",
    ),
    (
      [("a", [1], examples_of(1)), ("b", [1], {"x": np.zeros((1, 3))})],
      r"has fields \['x'\]",
    ),
    (
      [
        ("a", [1], {"x": np.zeros((1, 3))}),
        ("b", [1], {"x": np.zeros((1, 3), np.float32)}),
      ],
      r"one 'x' is float32 of shape \(3,\), in what came before.*float64",
    ),
    ([([7], [1], examples_of(1))], r"client 7 has no name"),
    ([("ab", [1.5, 1.5], examples_of(3))], r"sizes are float64"),
    ([(["\ud800"], [1], examples_of(1))], r"name that is no UTF-8"),
  ],
)
def test_what_cannot_be_written(tmp_path, blocks, message):
  with pytest.raises((ValueError, TypeError), match=message):
    write(tmp_path / "s", blocks)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"num_classes": 3},
      r"train: labels 'y' go from 0 to 3, and num_classes=3",
    ),
    ({"name": 3}, r"name is a int"),
  ],
)
def test_what_would_not_open_is_not_written(tmp_path, options, message):
  with pytest.raises((ValueError, TypeError), match=message):
    write(tmp_path / "s", [("a", [4], examples_of(4))], **options)
  assert not list(tmp_path.iterdir())
  write(tmp_path / "s", [("a", [4], examples_of(4))], num_classes=np.int64(4))
  assert open_store(tmp_path / "s").num_classes == 4


def test_a_block_that_was_refused_half_way(tmp_path):
  def write_on():
    with StoreWriter(tmp_path / "s") as store:
      train = store.split("train")
      train.append("a", [1], examples_of(1))
      with contextlib.suppress(ValueError):
        train.append("ba", [1, 1], examples_of(2), repeats=False)

  with pytest.raises(ValueError, match="an earlier block was refused half-way"):
    write_on()
  assert not list(tmp_path.iterdir())


def test_a_split_without_examples(tmp_path):
  def write_both():
    with StoreWriter(tmp_path / "s") as store:
      store.split("train").append("a", [1], examples_of(1))
      store.split("test").append(["test"], [0], examples_of(0))

  with pytest.raises(ValueError, match="test: there are no examples; leave it"):
    write_both()
  assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_when_clients_are_sorted(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "posix_fallocate", full)
  blocks = [("ab", [1, 1], examples_of(2)), ("a", [1], examples_of(1))]
  with pytest.raises(OSError, match="No space left.*Nothing was kept"):
    write(tmp_path / "s", blocks)
  assert not list(tmp_path.iterdir())


def test_a_store_is_read_once(tmp_path):
  write(tmp_path / "s", [("ab", [1, 2], examples_of(3))])
  train = open_store(tmp_path / "s").train
  assert isinstance(train, StoredData)
  copy = train.in_memory
  assert copy is train.in_memory
  assert not isinstance(copy.examples["x"], np.memmap)


def test_names_never_become_paths(tmp_path):
  names = ["../../escape", "/etc/passwd", ".", "a\n\0b"]
  write(tmp_path / "s", [(names, [1] * 4, examples_of(4))])
  assert list(tmp_path.iterdir()) == [tmp_path / "s"]
  assert list(open_store(tmp_path / "s").train.names or ()) == names


def test_a_client_twice_where_each_is_there_once(tmp_path):
  def write_twice():
    with StoreWriter(tmp_path / "s") as store:
      for _ in range(2):
        train = store.split("train")
        train.append("a", [1], examples_of(1), "f.json", repeats=False)

  with pytest.raises(ValueError, match=r"f\.json: client 'a' is there twice"):
    write_twice()
  assert not list(tmp_path.iterdir())


def test_seen_examples_of_a_stranger(tmp_path):
  def write_both():
    with StoreWriter(tmp_path / "s") as store:
      store.split("train").append("a", [1], examples_of(1))
      store.split("seen").append("z", [1], examples_of(1))

  with pytest.raises(ValueError, match="client 'z' is not among those that"):
    write_both()
  assert not list(tmp_path.iterdir())


def test_what_is_there_already_stays(tmp_path):
  (tmp_path / "s").write_text("mine")
  with pytest.raises(FileExistsError, match="is there already"):
    write(tmp_path / "s", [("a", [1], examples_of(1))])
  assert (tmp_path / "s").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    with pytest.raises(OSError, match=r"cannot write .*s: .*Nothing was kept"):
      write(tmp_path / "s", [("a", [5000], examples_of(5000))])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not list(tmp_path.iterdir())


def test_truncated_and_missing_files(tmp_path):
  path = tmp_path / "s"
  write(path, [("ab", [1, 2], examples_of(3))])
  file = path / "train" / "fields" / "x.npy"
  whole = file.read_bytes()
  file.write_bytes(whole[:-1])
  with pytest.raises(StoreError, match=r"x\.npy has 163 bytes, and 164 were"):
    open_store(path)
  file.unlink()
  with pytest.raises(StoreError, match=r"x\.npy is missing"):
    open_store(path)
  with pytest.raises(FileNotFoundError, match=r"is no store"):
    open_store(tmp_path)


def test_another_version(tmp_path):
  path = tmp_path / "s"
  write(path, [("ab", [1, 2], examples_of(3))])
  facts = json.loads((path / "store.json").read_text())
  (path / "store.json").write_text(json.dumps(facts | {"version": 2}))
  with pytest.raises(StoreError, match=r"is of version 2, and.*reads 1"):
    open_store(path)


@FIXTURE
@given(data=st.data())
def test_every_flipped_byte_is_found(data, tmp_path_factory):
  path = tmp_path_factory.mktemp("store") / "s"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(columns, "BLOCK", 64)
    write(path, [("abc", [4, 9, 2], examples_of(15))])
  files = sorted(p for p in path.rglob("*") if p.is_file())
  file = data.draw(st.sampled_from(files))
  content = bytearray(file.read_bytes())
  where = data.draw(st.integers(0, len(content) - 1))
  flip = data.draw(st.integers(1, 255))
  content[where] ^= flip
  file.write_bytes(content)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(columns, "BLOCK", 64)
    if file.name == "store.json" and _sealed(content):
      verify(path)  # another space in the text, or the like
    else:
      with pytest.raises(StoreError, match=re.escape(str(path))):
        verify(path)


def _sealed(text):
  try:
    facts = json.loads(text)
    return facts["sha256"] == format.seal(facts)
  except (ValueError, KeyError, TypeError):
    return False


def test_a_damaged_example_names_its_clients(tmp_path):
  path = tmp_path / "s"
  write(path, [("abc", [4, 9, 2], examples_of(15))])
  file = path / "train" / "fields" / "x.npy"
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  open_store(path)  # looks at nothing inside
  with pytest.raises(StoreError, match=r"x\.npy.*field 'x', clients 0 to 2"):
    verify(path)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.integration
@pytest.mark.usefixtures("exact")
def test_residencies_train_the_same(tmp_path):
  data = load_digits(num_clients=30, unseen_clients=4)
  store = tmp_path / "store"
  write_dataset(store, data)
  digests = {}
  for residency in ("host", "disk", "auto"):
    changes = {
      "data.name": "store",
      "data.path": str(store),
      "data.num_clients": "None",
      "data.partition": "None",
      "data.alpha": "None",
      "data.unseen_clients": "None",
      "server.rounds": "3",
      "server.clients_per_round": "5",
      "runtime.lanes": "1",
      "runtime.residency": residency,
    }
    folder = tmp_path / residency
    experiment.run(flags.load(str(DIGITS), changes), folder)
    summary = json.loads((folder / "summary.json").read_text())
    digests[residency] = summary["params_digest"]
    assert summary["residency"] == (
      "device" if residency == "auto" else residency
    )
  assert len(set(digests.values())) == 1


@pytest.mark.parametrize(
  ("field", "value", "remedy"),
  [
    ("heldout_fraction", "0.2", "data partition --heldout-fraction=..."),
    ("unseen_clients", "1", "data partition --unseen-clients=..."),
    ("unseen_clients", "('c0',)", "data partition --unseen-clients=..."),
    ("min_examples", "2", "data partition --min-examples=..."),
    ("server_clients", "1", "leave it out, or give runtime.residency='host'"),
    ("random_label_clients", "0.5", "leave it out, or give"),
  ],
)
def test_what_takes_a_store_off_the_disk(tmp_path, field, value, remedy):
  """The field that does it is named, and not the store."""
  with StoreWriter(tmp_path / "s") as store:
    x, y = np.zeros((8, 64), np.float32), np.arange(8, dtype=np.uint8)
    store.split("train").append(["c0", "c1"], [5, 3], {"x": x, "y": y})
  unset = ("num_clients", "partition", "alpha", "unseen_clients")
  changes = dict.fromkeys((f"data.{k}" for k in unset), "None")
  changes |= {
    "data.name": "store",
    "data.path": str(tmp_path / "s"),
    "runtime.residency": "disk",
    "server.clients_per_round": "1",
  }
  simulator = build(flags.load(str(DIGITS), changes)).simulator
  assert simulator.residency.name == "disk"
  changes[f"data.{field}"] = value
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    build(flags.load(str(DIGITS), changes))
  assert str(caught.value).startswith(f"data.{field}={value} copies a store's")
  assert remedy in str(caught.value)


@pytest.mark.parametrize("y", [np.eye(3, dtype=np.float32), np.ones(3, bool)])
def test_labels_that_are_no_classes(tmp_path, y):
  """Refused when written, with the way out, which works."""
  examples = {"x": np.zeros((3, 2), np.float32), "y": y}
  with (
    pytest.raises(ValueError, match=r"num_classes=3; .* or num_classes=0 if"),
    StoreWriter(tmp_path / "s", num_classes=3) as store,
  ):
    store.split("train").append(["a"], [3], examples)
  assert not (tmp_path / "s").exists()
  with StoreWriter(tmp_path / "s", num_classes=0) as store:
    store.split("train").append(["a"], [3], examples)
  assert open_store(tmp_path / "s").num_classes == 0


def test_the_disk_is_of_stores():
  changes = {"runtime.residency": "disk"}
  with pytest.raises(ValueError, match=r"residency='disk' reads a store"):
    _ = build(flags.load(str(DIGITS), changes)).simulator.residency


def test_opening_reads_no_examples(tmp_path, monkeypatch):
  """A store opens though its examples are a hole of a terabyte."""
  path = tmp_path / "s"
  write(path, [("ab", [1, 2], examples_of(3))])
  file = path / "train" / "fields" / "x.npy"
  rows = 10**11
  head = columns.header(np.dtype(np.float32), (rows, 3))
  facts = json.loads((path / "store.json").read_text())
  for name in ("x", "y"):
    said = facts["splits"]["train"]["files"][f"fields/{name}.npy"]
    said["shape"][0] = rows
    head = columns.header(np.dtype(said["dtype"]), tuple(said["shape"]))
    file = path / "train" / "fields" / f"{name}.npy"
    size = np.dtype(said["dtype"]).itemsize * int(np.prod(said["shape"]))
    with file.open("wb") as opened:
      opened.write(head)
      try:
        os.truncate(file, len(head) + size)
      except OSError:
        pytest.skip("this file system has no such large files")
  offsets = np.array([0, 1, rows])
  np.save(path / "train" / "offsets.npy", offsets)
  facts["sha256"] = format.seal(facts)
  (path / "store.json").write_text(json.dumps(facts))
  data = open_store(path)
  assert data.train.num_examples == rows
  assert FederatedData.client(data.train, 0)["x"].shape == (1, 3)


def test_the_code_of_the_document_runs(tmp_path, monkeypatch, capsys):
  document = pathlib.Path(__file__).parents[2] / "docs" / "store.md"
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
  assert len(blocks) == 2
  for block in blocks:
    exec(block, {})
  assert capsys.readouterr().out == "300 client 0-7\n"


def test_a_disk_that_stays_full(tmp_path, monkeypatch):
  """What closes the files fails again, and nothing is left all the same."""

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  close = columns.Column.close

  def write():
    with StoreWriter(tmp_path / "s") as store:
      split = store.split("train")
      split.append(["a"], [1], {"x": np.zeros(1)})
      monkeypatch.setattr(columns.Column, "append", full)
      monkeypatch.setattr(
        columns.Column, "close", lambda column: full(close(column))
      )
      split.append(["b"], [1], {"x": np.zeros(1)})

  with pytest.raises(OSError, match="cannot write .*with space left"):
    write()
  assert not any(tmp_path.iterdir())
