"""Awkward files, put through the loader and the importer of their format.

Both give the same clients and the same batches, which are written down here;
or both refuse.
"""

import json
import warnings
from typing import Any

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import load_leaf_json, load_npz, open_store
from fedjax_sim.data.importers import (
  flute_hdf5,
  import_store,
  json_lines,
  leaf_json,
  npz,
)


def batches(data):
  """Client -> what a model gets of its examples, as lists."""
  train = data.train
  found = {}
  for i in range(train.num_clients):
    held = {k: jnp.asarray(np.array(v)) for k, v in train.client(i).items()}
    ready = data.prepare(held)
    found[train.client_name(i)] = {
      k: (str(v.dtype), np.asarray(v).tolist()) for k, v in ready.items()
    }
  return found


def imported(source, path, **options):
  import_store(path, {"train": source}, **options)
  return open_store(path)


def both(tmp_path, load, source, **options):
  """What loader and importer make of a file, and what they warn of."""
  found, told = [], []
  for make in (load, lambda: imported(source, tmp_path / "s", **options)):
    with warnings.catch_warnings(record=True) as said:
      warnings.simplefilter("always")
      data = make()
    told.append([str(w.message).partition(": ")[2] for w in said])
    found.append((data.num_classes, batches(data)))
  assert found[0] == found[1]
  assert told[0] == told[1]
  return found[0], told[0]


def leaf(data, counts=None, **more):
  sizes = [len(held["x"]) for held in data.values()]
  counts = sizes if counts is None else counts
  return {
    "users": list(data),
    "num_samples": counts,
    "user_data": data,
    **more,
  }


TWEET = ["1467810672", "Mon Apr 06", "NO_QUERY", "scotthamilton"]
TWO: dict[str, dict[str, list[Any]]] = {
  "a": {"x": [[1], [2]], "y": [0, 1]},
  "b": {"x": [[3]], "y": [1]},
}
PLAIN = {
  "a": {"x": ("float32", [[1], [2]]), "y": ("int32", [0, 1])},
  "b": {"x": ("float32", [[3]]), "y": ("int32", [1])},
}
COUNT = (
  "num_samples is not the length of x and y, which agree; theirs is taken."
)
EMPTY = "there are no examples, and who has none is left out."
LISTS = {name: held["x"] for name, held in TWO.items()}
LABELS = {name: held["y"] for name, held in TWO.items()}
NONE: dict[str, list[Any]] = {"x": [], "y": []}

# name -> the file, what the clients are, what is told, options
JSON: dict[str, tuple[Any, Any, list[str]]] = {
  "leaf's test split counts more than it has": (
    leaf(TWO, [81, 80]),
    PLAIN,
    [f"user 'a' (and 1 more): {COUNT}"],
  ),
  "a user without examples is listed": (
    leaf({**TWO, "c": NONE}),
    PLAIN,
    [f"user 'c': {EMPTY}"],
  ),
  "users without examples are in user_data alone": (
    leaf(TWO, user_data={"d": NONE, **TWO, "c": NONE}),
    PLAIN,
    [f"user 'd' (and 1 more): {EMPTY}"],
  ),
  "a user without examples is in users alone": (
    leaf(TWO, users=["a", "c", "b"], num_samples=[2, 0, 1]),
    PLAIN,
    [f"user 'c': {EMPTY}"],
  ),
  "whole labels are fractions": (
    leaf({u: {**h, "y": [float(y) for y in h["y"]]} for u, h in TWO.items()}),
    PLAIN,
    [],
  ),
  "some labels are fractions": (
    leaf({"a": {"x": [[1]], "y": [2.0]}, "b": {"x": [[3]], "y": [0.5]}}),
    {
      "a": {"x": ("float32", [[1]]), "y": ("float32", [2.0])},
      "b": {"x": ("float32", [[3]]), "y": ("float32", [0.5])},
    },
    [],
  ),
  "some features are fractions": (
    leaf({"a": {"x": [[1]]}, "b": {"x": [[0.5]]}}),
    {"a": {"x": ("float32", [[1]])}, "b": {"x": ("float32", [[0.5]])}},
    [],
  ),
  # FLUTE's scripts and documents
  "more num_samples than users": (
    leaf(TWO, [2, 1, 7, 7]),
    PLAIN,
    [
      "num_samples has more entries than there are users; the first ones are"
      " taken."
    ],
  ),
  "features are texts": (
    leaf({"a": {"x": [["1", "0.5"], ["2e0", "-1"]], "y": [0, 1]}}),
    {"a": {"x": ("float32", [[1, 0.5], [2, -1]]), "y": ("int32", [0, 1])}},
    [],
  ),
  "user_data and user_data_label are lists": (
    leaf(TWO, user_data=LISTS, user_data_label=LABELS),
    PLAIN,
    [],
  ),
  "labels are objects": (
    leaf(
      {u: {"x": x} for u, x in LISTS.items()},
      user_data_label={u: {"x": y} for u, y in LABELS.items()},
    ),
    PLAIN,
    [],
  ),
  "the label of a single example is no list": (
    leaf(
      TWO,
      user_data=LISTS,
      user_data_label={"a": [0, 1], "b": 1},
    ),
    PLAIN,
    [],
  ),
}


@pytest.mark.parametrize("case", JSON)
def test_json(tmp_path, case):
  held, clients, told = JSON[case]
  file = tmp_path / "a.json"
  file.write_text(json.dumps(held))
  found, said = both(
    tmp_path, lambda: load_leaf_json(path=file), leaf_json(file)
  )
  assert found[1] == clients
  assert found[0] == (2 if clients is PLAIN else found[0])
  assert said == told


TEXTS = {
  "tweets": (
    leaf(
      {
        "a": {"x": [[*TWEET, "ab"], [*TWEET, "b"]], "y": [0, 1]},
        "b": {"x": [[*TWEET, "cab"]], "y": [1]},
      }
    ),
    {
      "a": {"x": ("int32", [[1, 2], [2, 0]]), "y": ("int32", [0, 1])},
      "b": {"x": ("int32", [[3, 1]]), "y": ("int32", [1])},
    },
  ),
  "lists of lists of texts": (  # FLUTE's mlm_bert
    leaf(
      {"a": {"x": [0]}},
      user_data={"a": [["a", "b"], ["a"]]},
      num_samples=[2],
    ),
    # 1 is the line break, a is 2, b is 3: a, break, b, break, a
    {"a": {"x": ("int32", [[2, 1], [3, 1]]), "y": ("int32", [[1, 3], [1, 2]])}},
  ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_of_json(tmp_path, case):
  held, clients = TEXTS[case]
  file = tmp_path / "a.json"
  file.write_text(json.dumps(held))
  found, said = both(
    tmp_path,
    lambda: load_leaf_json(path=file, sequence_length=2),
    leaf_json(file),
    text="characters",
    sequence_length=2,
  )
  assert (found[1], said) == (clients, [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_json(tmp_path, encoding):
  """What Windows writes has a mark; independent of it, the same clients."""
  file = tmp_path / "a.json"
  file.write_bytes(json.dumps(leaf(TWO)).encode(encoding))
  load = lambda: load_leaf_json(path=file)
  assert both(tmp_path, load, leaf_json(file)) == ((2, PLAIN), [])


REFUSED = {
  "y is shorter": (leaf({"a": {"x": [[1], [2]], "y": [1]}}), "y has 1 entries"),
  "no labels to agree with": (
    leaf({"a": {"x": [[1]]}}, [2]),
    "s is 2; expected",
  ),
  "data of somebody else": (
    leaf(TWO, users=["a"], num_samples=[2]),
    "but not in",
  ),
  "too few counts": (leaf(TWO, [2]), "expected 2, one a user, found 1"),
  "a name that is none": (leaf(TWO, users=["a", 3]), "user 3: expected a name"),
  "twice a user": (
    json.dumps(leaf(TWO))[:-1]
    + ", "
    + json.dumps({"user_data": {"a": 1, "b": 2}})[1:-2].replace("b", "a")
    + "}}",
    "twice|not",
  ),
  "a text among numbers": (
    leaf({"a": {"x": [["1", "q"]]}}),
    "expected numbers",
  ),
  "nobody has examples": (
    leaf({"a": NONE}),
    "here is no client with",
  ),
  "of several shapes": (leaf({"a": {"x": [[1], [2, 3]]}}), "of one shape"),
  "not a number": (leaf({"a": {"x": [[float("nan")]]}}), "nan|JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_json_that_both_refuse(tmp_path, case):
  held, message = REFUSED[case]
  file = tmp_path / "a.json"
  file.write_text(held if isinstance(held, str) else json.dumps(held))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match=message):
      load_leaf_json(path=file)
    with pytest.raises(ValueError, match=message):
      imported(leaf_json(file), tmp_path / "s")
  assert not (tmp_path / "s").exists()


def test_a_map_sees_rows_that_are_odd(tmp_path):
  """Tweets as they are, and features of several lengths."""
  held = leaf({"a": {"x": [[*TWEET, "ab"], [*TWEET, "b"]], "y": [0, 1]}})
  file = tmp_path / "a.json"
  file.write_text(json.dumps(held))
  seen = []

  def second(client, examples):
    seen.extend(examples["x"])
    return {"x": [row[1] for row in examples["x"]], "y": examples["y"]}

  data = imported(
    leaf_json(file, raw=True), tmp_path / "s", map=second, text="words"
  )
  assert seen[:2] == held["user_data"]["a"]["x"]
  assert sorted(data.train.examples["x"][0, :3].tolist()) == [4, 5, 6]
  file.write_text(json.dumps(leaf({"a": {"x": [[1], [2, 3]], "y": [0, 1]}})))
  data = imported(
    leaf_json(file, raw=True),
    tmp_path / "t",
    map=lambda _, e: {"x": [sum(row) for row in e["x"]], "y": e["y"]},
  )
  assert data.train.examples["x"].tolist() == [1, 5]


def test_a_map_sees_lines_that_are_odd(tmp_path):
  file = tmp_path / "a.jsonl"
  lines = [{"client": "a", "x": {"b": i}, "y": i} for i in range(3)]
  file.write_text("\n".join(map(json.dumps, lines)))
  with pytest.raises(ValueError, match="x: expected numbers"):
    imported(json_lines(file, client="client"), tmp_path / "s")
  data = imported(
    json_lines(file, client="client", raw=True),
    tmp_path / "s",
    map=lambda _, e: {"x": [row["b"] / 2 for row in e["x"]], "y": e["y"]},
  )
  assert data.train.examples["x"].tolist() == [0, 0.5, 1]


def test_texts_of_hdf5_that_are_no_numbers(tmp_path):
  """Several an example: a map makes something of them."""
  with h5py.File(tmp_path / "a.hdf5", "w") as out:
    out["users"], out["num_samples"] = ["u"], [2]
    out["user_data/u/x"] = [["1", "a b"], ["2", "b"]]
  source = flute_hdf5(tmp_path / "a.hdf5")
  with pytest.raises(ValueError, match="first 'a b' in client 'u', example 0"):
    imported(source, tmp_path / "s")
  second = lambda _, e: {"x": e["x"][:, 1]}
  data = imported(source, tmp_path / "s", map=second, text="words")
  # b is 4 and a is 5, between the beginning and the end, 2 and 3
  assert data.train.examples["x"][:, :3].tolist() == [[2, 5, 4], [2, 4, 0]]


def test_flute_in_hdf5(tmp_path):
  """As classif_cnn and ecg_cnn write it, and as the documents say."""
  for inner in (False, True):
    file = tmp_path / f"{inner}.hdf5"
    with h5py.File(file, "w") as out:
      out["users"], out["num_samples"] = ["0000", "0001"], 10 * [2]
      for i in range(2):
        out[f"user_data/{i:04d}/x"] = [["0.5", "1.0"], ["2", "-3e-1"]]
        out[f"user_data_label/{i:04d}{'/x' * inner}"] = [i, 1]
    with pytest.warns(UserWarning, match="num_samples has more entries than"):
      data = imported(flute_hdf5(file), tmp_path / f"{inner}")
    x = ("float32", np.array([[0.5, 1], [2, -0.3]], np.float32).tolist())
    assert batches(data) == {
      f"{i:04d}": {"x": x, "y": ("int32", [i, 1])} for i in range(2)
    }


X = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
OWNER = np.array(["b", "a", "b", "c", "a"])
BASE: dict[str, Any] = {"x": X, "y": np.arange(5), "client": OWNER}
ARRAYS: dict[str, dict[str, Any]] = {
  "plain": {},
  "in Fortran order": {"x": np.asfortranarray(X)},
  "big-endian": {"x": X.astype(">f4"), "y": np.arange(5, dtype=">i8")},
  "big-endian in Fortran order": {"x": np.asfortranarray(X.astype(">f4"))},
  "names of bytes": {"client": OWNER.astype(bytes)},
  "names in big-endian": {"client": OWNER.astype(">U3")},
  "names of numbers": {"client": np.array([1, 0, 1, 2, 0], ">u2")},
}


@pytest.mark.parametrize("case", ARRAYS)
def test_npz(tmp_path, case):
  given: dict[str, Any] = {"x": X, "y": np.arange(5), "client": OWNER} | ARRAYS[
    case
  ]
  np.savez(tmp_path / "a.npz", **given)
  source = npz(tmp_path / "a.npz", client="client")
  load = lambda: load_npz(path=tmp_path / "a.npz")
  found, _ = both(tmp_path, load, source, prepare="stored")
  names = "abc" if given["client"].dtype.kind != "u" else "012"
  assert found[1] == {
    name: {
      "x": ("float32", X[letter == OWNER].tolist()),
      "y": ("int32", np.arange(5)[letter == OWNER].tolist()),
    }
    for name, letter in zip(names, "abc", strict=True)
  }


NPZ_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
  "objects": ({"x": np.array([None] * 5)}, "unpickl"),
  "names of fractions": ({"client": np.arange(5.0)}, "client|Client"),
  "complex": ({"x": X + 1j}, "complex"),
  "too few": ({"x": X[:3]}, "3"),
}


@pytest.mark.parametrize("case", NPZ_REFUSED)
def test_npz_that_both_refuse(tmp_path, case):
  changes, message = NPZ_REFUSED[case]
  file = tmp_path / "a.npz"
  np.savez(file, **(BASE | changes))
  with pytest.raises((TypeError, ValueError), match=message):
    load_npz(path=file)
  with pytest.raises((TypeError, ValueError), match=message):
    imported(npz(file), tmp_path / "s")
