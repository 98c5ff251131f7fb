"""`fedjax-sim data`: stores of a config's data set, and what is in them."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from fedjax_sim import reporting
from fedjax_sim.cli.main import main
from fedjax_sim.config import flags
from fedjax_sim.config.build import build, build_data
from fedjax_sim.data import (
  StoreWriter,
  load_store,
  open_store,
  partition_store,
  preprocess,
  write_store,
)
from fedjax_sim.data.importers import blocks
from fedjax_sim.data.store import rewrite
from test_features import DIGITS

IMPORT = ["data", "import", f"--config={DIGITS}"]
MOST = {"data.heldout_fraction": "0.3", "data.server_clients": "3"}


def said(capsys, *arguments):
  code = main(arguments)
  out = capsys.readouterr()
  return code, out.out, out.err


@pytest.mark.parametrize("block", [1, 3000, 2**24])
def test_every_split_of_a_config(tmp_path, monkeypatch, block):
  monkeypatch.setattr(rewrite, "BLOCK", block)
  data = build_data(flags.load(str(DIGITS), MOST))
  write_store(tmp_path / "s", data)
  found = open_store(tmp_path / "s")
  assert found.prepare is data.prepare
  assert (found.name, found.num_classes) == (data.name, data.num_classes)
  for name in ("train", "seen", "unseen"):
    one, other = getattr(data, name), getattr(found, name)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    for field, values in one.examples.items():
      np.testing.assert_array_equal(values, other.examples[field])
  for name in ("test", "server"):
    one, other = getattr(data, name), getattr(found, name)
    np.testing.assert_array_equal(one["x"], other["x"])


def test_labelled_and_unlabelled_examples_are_kept(tmp_path):
  changes = {"data.labelled_fraction": "0.3"}
  data = build_data(flags.load(str(DIGITS), changes))
  write_store(tmp_path / "s", data)
  found = open_store(tmp_path / "s")
  assert found.splits.keys() == data.splits.keys()
  for name, one in data.splits.items():
    other = found.splits[name]
    np.testing.assert_array_equal(one.offsets, other.offsets)
    for field, values in one.examples.items():
      np.testing.assert_array_equal(values, other.examples[field])
  with pytest.raises(ValueError, match="heldout_fraction would split clients"):
    load_store(path=tmp_path / "s", heldout_fraction=0.2)
  found = dataclasses.replace(found, unseen=None)
  with pytest.raises(ValueError, match="has the split 'labelled', so its"):
    partition_store(tmp_path / "t", found, unseen_clients=1)
  odd = dataclasses.replace(data, splits={"mine": data.train})
  with pytest.raises(ValueError, match="split='mine' is unknown"):
    write_store(tmp_path / "t", odd)


def test_flute_s_files_of_few_labels(tmp_path, capsys):
  """As its script for semi-supervision writes them; they train FedLabels."""
  rng = np.random.default_rng(0)

  def users(count, one=False):
    names = [f"{i:04d}" for i in range(3)]
    x = {u: rng.normal(size=(count, 4)).tolist() for u in names}
    y = {u: rng.integers(0, 2, count).tolist() for u in names}
    if one:  # a user an example, whose label is no list
      y = {u: labels[0] for u, labels in y.items()}
    held = {"users": names, "num_samples": [count] * 3}
    return {**held, "user_data": x, "user_data_label": y}

  files = {"labelled": 2, "unlabelled": 5, "test": 1}
  given = [f"--store={tmp_path / 's'}", "--format=leaf_json"]
  for split, count in files.items():
    file = tmp_path / f"{split}.json"
    file.write_text(json.dumps(users(count, split == "test")))
    given.append(f"--{split}={file}")
  given.append(f"--train={tmp_path / 'labelled.json'}")
  code, out, err = said(capsys, "data", "import", *given)
  assert (code, err) == (0, "")
  assert "unlabelled 3 clients, 15 examples" in " ".join(out.split())
  data = open_store(tmp_path / "s")
  assert data.splits["labelled"].num_examples == data.train.num_examples == 6
  assert data.test is not None
  assert len(data.test["y"]) == 3
  for split in data.splits:
    to = tmp_path / f"{split}.npz"
    given = [f"--store={tmp_path / 's'}", f"--split={split}", f"--to={to}"]
    assert said(capsys, "data", "export", "--format=npz", *given)[0] == 0
    with np.load(to) as held:
      np.testing.assert_array_equal(held["x"], data.splits[split].examples["x"])
  config = flags.load(
    "configs/mnist_fedlabels.py:smoke",
    {
      "data.name": "store",
      "data.path": str(tmp_path / "s"),
      "data.labelled_fraction": "None",
      "algorithm.magnitude": "0.0",
    },
  )
  assert build(config).simulator.data.splits.keys() == data.splits.keys()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("reshape", "(8, 8)"),
    ("label_lookup", "no.npy"),
    ("normalize", "(0.5, 0.25)"),
    ("pad", "80"),
    ("crop", "1"),
    ("flip", "True"),
  ],
)
def test_what_is_done_to_batches_is_no_part_of_a_store(
  tmp_path, capsys, field, value
):
  flag = f"--config.data.{field}={value}"
  code, _, err = said(capsys, *IMPORT, f"--store={tmp_path / 's'}", flag)
  assert code == 2
  told = repr(value) if field == "label_lookup" else value
  assert f"data.{field}={told}: a store holds examples as they are" in err
  assert not list(tmp_path.iterdir())


def test_a_data_set_that_changes_training_batches_is_refused(tmp_path):
  data = build_data(flags.load(str(DIGITS)))
  data = preprocess.with_flip(preprocess.with_reshape(data, (8, 8)))
  for changed in (data, dataclasses.replace(data, augment=None)):
    with pytest.raises(ValueError, match="in a way of its own"):
      write_store(tmp_path / "s", changed)


def test_an_import_tells_which_columns_went_where(tmp_path, capsys):
  file = tmp_path / "a.csv"
  file.write_text("client,r1,r2,label,age\na,1,2,0,3\nb,4,5,1,6\n")
  given = ["--format=csv", f"--train={file}", f"--store={tmp_path / 's'}"]
  fields = "--fields=x:r*+*,y:label"
  code, out, err = said(capsys, "data", "import", *given, fields)
  assert (code, err) == (0, "")
  out = " ".join(out.split())
  assert "made x of 3: r1, r2, age made y of label bytes" in out
  x = open_store(tmp_path / "s").train.examples["x"]
  np.testing.assert_array_equal(x, [[1, 2, 3], [4, 5, 6]])


def test_what_info_tells(tmp_path, capsys):
  store, picture = tmp_path / "s", tmp_path / "clients.png"
  code, out, err = said(capsys, *IMPORT, f"--store={store}")
  assert (code, err) == (0, "")
  assert "90 clients, 1,295 examples (14 to 15 a client" in out
  more = [f"--store={store}", "--verify", f"--out={picture}"]
  code, out, _ = said(capsys, "data", "info", *more)
  assert code == 0
  assert "all as written" in out
  labels = open_store(store).train.examples["y"]
  share = 100 * np.mean(labels == 3)
  assert f"3: {share:.1f} %" in out
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_few_clients_are_listed_and_named(tmp_path, capsys, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    reporting, "draw_clients", lambda *given: drawn.append(given)
  )
  file = tmp_path / "a.csv"
  for count, listed in ((4, True), (17, False)):
    rows = [f"h{i},{j},0" for i in range(count) for j in range(i + 1)]
    file.write_text("\n".join(["client,x,y", *rows, ""]))
    store = tmp_path / f"s{count}"
    given = ["--format=csv", f"--train={file}", f"--store={store}"]
    assert said(capsys, "data", "import", *given)[0] == 0
    _, out, _ = said(capsys, "data", "info", f"--store={store}", "--out=p.png")
    assert ("clients of train  h0: 1, h1: 2, h2: 3, h3: 4\n" in out) == listed
    names = [f"h{i}" for i in range(4)]
    assert drawn.pop()[-1] == (names if listed else None)


def test_clients_who_never_train_by_name(tmp_path, capsys):
  file = tmp_path / "a.csv"
  rows = [f"{h},{i},0" for i in range(3) for h in ("ann", "bob", "7")]
  file.write_text("\n".join(["client,x,y", *rows, ""]))
  store = f"--store={tmp_path / 's'}"
  given = ["--format=csv", f"--train={file}", store]
  assert said(capsys, "data", "import", *given)[0] == 0
  for i, (text, unseen) in enumerate(
    {"bob": ["bob"], "7,ann": ["ann", "7"], "7,": ["7"]}.items()
  ):
    to = tmp_path / f"t{i}"
    code, _, err = said(
      capsys,
      "data",
      "partition",
      store,
      f"--to={to}",
      f"--unseen-clients={text}",
    )
    assert (code, err) == (0, "")
    found = open_store(to)
    assert found.unseen is not None
    assert found.unseen.names is not None
    assert found.train.names is not None
    assert list(found.unseen.names) == unseen
    assert {*found.train.names} == {"ann", "bob", "7"} - {*unseen}
  code, _, err = said(
    capsys,
    "data",
    "partition",
    store,
    f"--to={tmp_path / 'u'}",
    "--unseen-clients=bop",
  )
  assert code == 2
  assert "there is no client 'bop'. Did you mean 'bob'?" in err


def test_without_classes_one_panel(tmp_path, capsys):
  with StoreWriter(tmp_path / "s", num_classes=0) as store:
    x = np.zeros((60, 2), np.float32)
    store.split("train").append("ab", [1, 59], {"x": x})
  picture = tmp_path / "c.png"
  more = [f"--store={tmp_path / 's'}", f"--out={picture}"]
  code, out, _ = said(capsys, "data", "info", *more)
  assert code == 0
  assert "labels of train" not in out
  assert picture.exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["data"],
      "say what to do first, one of copy, export, import, info, partition",
    ),
    (["data", "inform"], "data='inform' is unknown. Did you mean 'info'?"),
    (["data", "info"], "--store=... is missing"),
    (["data", "info", "--store=nowhere"], "nowhere is no store"),
    ([*IMPORT, "--store=."], ". is there already"),
  ],
)
def test_what_is_refused(tmp_path, capsys, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  code, out, err = said(capsys, *arguments)
  assert (code, out) == (2, "")
  assert message in err
  assert not list(tmp_path.iterdir())


def test_a_damaged_store_is_told(tmp_path, capsys):
  store = tmp_path / "s"
  said(capsys, *IMPORT, f"--store={store}")
  file = store / "unseen" / "fields" / "y.npy"
  content = bytearray(file.read_bytes())
  content[-1] ^= 255
  file.write_bytes(content)
  code, _, err = said(capsys, "data", "info", f"--store={store}", "--verify")
  assert code == 2
  assert "y.npy" in err
  assert "checksum differs" in err


def test_from_a_file_to_another(tmp_path, capsys):
  """Import, partition, export and import again, as a user would."""
  rng = np.random.default_rng(0)
  np.savez(
    tmp_path / "a.npz",
    pixels=rng.integers(0, 256, (40, 3), np.uint8),
    label=rng.integers(0, 4, 40),
    user=np.repeat(["ann", "bob", "cy", "di"], 10),
  )
  mine = tmp_path / "mine.py"
  mine.write_text(
    "def evens(client, examples):\n"
    "  keep = examples['y'] % 2 == 0\n"
    "  return {k: v[keep] for k, v in examples.items()}\n"
  )
  one, two = tmp_path / "one", tmp_path / "two"
  given = [f"--train={tmp_path / 'a.npz'}", f"--test={tmp_path / 'a.npz'}"]
  given += ["--client=user", "--fields=x:pixels,y:label", "--dtypes=y:uint8"]
  given += [f"--map={mine}:evens", "--num-classes=4", "--prepare=bytes"]
  code, out, err = said(
    capsys, "data", "import", "--format=npz", f"--store={one}", *given
  )
  assert (code, err) == (0, "")
  data = open_store(one)
  assert data.train.num_clients == 4
  assert set(data.train.examples["y"].tolist()) == {0, 2}
  assert data.test is not None
  assert len(data.test["y"]) == data.train.num_examples
  assert f"{data.train.num_examples} examples" in out
  more = [f"--to={two}", "--unseen-clients=1", "--heldout-fraction=0.3"]
  code, out, _ = said(capsys, "data", "partition", f"--store={one}", *more)
  assert code == 0
  assert "unseen 1 clients" in " ".join(out.split())
  more = ["--format=leaf_json", f"--to={tmp_path / 'u.json'}", "--split=unseen"]
  code, out, _ = said(capsys, "data", "export", f"--store={two}", *more)
  assert code == 0
  assert "u.json  1 clients" in out
  again = ["--format=leaf_json", f"--train={tmp_path / 'u.json'}"]
  again += [f"--store={tmp_path / 'again'}"]
  code, _, _ = said(capsys, "data", "import", *again)
  assert code == 0
  found: Any
  unseen: Any
  found, unseen = open_store(tmp_path / "again").train, open_store(two).unseen
  np.testing.assert_array_equal(found.examples["x"], unseen.examples["x"])
  more = ["--format=npz", f"--to={tmp_path / 'test.npz'}", "--split=test"]
  assert said(capsys, "data", "export", f"--store={two}", *more)[0] == 0
  test: Any = open_store(two).test
  with np.load(tmp_path / "test.npz") as held:
    np.testing.assert_array_equal(held["x"], test["x"])
    assert set(held["client"]) == {"test"}


@pytest.mark.parametrize(
  ("first", "last", "flag", "dtype"),
  [
    ("1,7", "1.5,8", "--dtypes=x:float32", "float32"),
    ("7,1", "x y,1", "--text=words", "int32"),
  ],
)
def test_kinds_of_columns_that_come_late(
  tmp_path, capsys, monkeypatch, first, last, flag, dtype
):
  """Of a CSV file, whose first rows decide unless a flag does."""
  monkeypatch.setattr(blocks, "BLOCK", 256)
  file = tmp_path / "a.csv"
  rows = ["client,x,y", *[f"a,{first}"] * 99, f"b,{last}", ""]
  file.write_text("\n".join(rows))
  given = ["--format=csv", f"--train={file}", f"--store={tmp_path / 's'}"]
  code, _, err = said(capsys, "data", "import", *given)
  assert code == 2
  assert f"invalid value '{last.partition(',')[0]}'" in err
  assert "column 'x': row 99: " in err
  assert "named in dtypes as float32" in err
  assert list(tmp_path.iterdir()) == [file]
  assert said(capsys, "data", "import", *given, flag)[0] == 0
  train = open_store(tmp_path / "s").train
  assert train.examples["x"].dtype == dtype
  assert train.sizes.tolist() == [99, 1]


def test_text_with_the_vocabulary_of_another_store(tmp_path, capsys):
  (tmp_path / "a.jsonl").write_text('{"client": 1, "x": "a b a"}\n')
  (tmp_path / "b.jsonl").write_text('{"client": 1, "x": "c b"}\n')
  for name, more in (("a", []), ("b", [f"--vocabulary={tmp_path / 'a'}"])):
    code, out, _ = said(
      capsys,
      *("data", "import", "--format=json_lines", "--text=words", *more),
      *(f"--train={tmp_path / name}.jsonl", f"--store={tmp_path / name}"),
    )
    assert code == 0
    assert "vocabulary 2 entries" in " ".join(out.split())
  x = open_store(tmp_path / "b").train.examples["x"]
  assert x[0, :4].tolist() == [2, 1, 5, 0]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["import"], "--store=... is missing"),
    (["import", "--store=s"], "--format=... is missing"),
    (["import", "--store=s", "--format=leaf"], "Did you mean 'leaf_json'?"),
    (["import", "--store=s", "--format=npz"], "--train=... is missing"),
    (
      ["import", "--store=s", "--format=leaf_json", "--train=a", "--client=c"],
      "--client=c is for tables",
    ),
    (
      ["import", "--store=s", "--format=npz", "--train=a", "--fields=x"],
      "--fields=x: 'x' is no pair",
    ),
    (
      ["import", "--store=s", "--format=npz", "--train=a", "--vocabulary=b"],
      "--vocabulary is for text",
    ),
    (
      ["import", "--store=s", "--format=npz", "--train=a", "--num-classes=b"],
      "--num-classes=b is wrong; give a whole number",
    ),
    (["import", "--store=s", "--format=npz", "--train=a"], "There is no a"),
    (
      ["import", "--store=s", "--format=npz", "--train=a", "--map=no.py:f"],
      "--map='no.py:f'",
    ),
    (["partition", "--store=nowhere", "--to=s"], "say what is to be other"),
    (["partition", "--store=nowhere", "--to=s", "--seed=1"], "say what is to"),
    (
      ["partition", "--store=no", "--to=s", "--unseen-clients=1"],
      "is no store",
    ),
    (["export", "--store=no", "--format=npz", "--to=s"], "is no store"),
    (["export", "--store=no", "--to=s"], "--format=... is missing"),
  ],
)
def test_what_else_is_refused(
  tmp_path, capsys, monkeypatch, arguments, message
):
  monkeypatch.chdir(tmp_path)
  code, _, err = said(capsys, "data", *arguments)
  assert code
  assert message in err
  assert not any(tmp_path.iterdir())


def test_damaged_labels_are_found_by_checksums_first(tmp_path, capsys):
  with StoreWriter(tmp_path / "s", num_classes=4) as store:
    y = np.arange(3, dtype=np.uint8)
    examples: Any = {"x": np.zeros(3, np.float32), "y": y}
    store.split("train").append("ab", [1, 2], examples)
  file = tmp_path / "s" / "train" / "fields" / "y.npy"
  file.write_bytes(file.read_bytes()[:-1] + b"\xc8")
  code, _, err = said(capsys, "data", "info", f"--store={tmp_path / 's'}")
  assert code
  assert "field 'y' holds labels from 0 to 200, and there are 4 classes" in err
  more = [f"--store={tmp_path / 's'}", "--verify"]
  code, _, err = said(capsys, "data", "info", *more)
  assert code
  assert "y.npy" in err
  more = [f"--store={tmp_path / 's'}", "--unseen-clients=1"]
  inside = f"--to={tmp_path / 's' / 'train' / 'two'}"
  code, _, err = said(capsys, "data", "partition", *more, inside)
  assert code
  assert "is inside of" in err
