"""LEAF's and FLUTE's JSON: read as written, refused with file and user."""

import gzip
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import load_leaf_json


def leaf(**changes):
  held = {
    "users": ["bo", "al"],
    "num_samples": [2, 1],
    "user_data": {
      "al": {"x": [[0.5, 1]], "y": [1]},
      "bo": {"x": [[1, 2], [3, 4]], "y": [0, 2]},
    },
  }
  return held | changes


def of(x, y=None):
  """A file of users with these inputs and labels."""
  data = {name: {"x": value} for name, value in x.items()}
  for name, value in (y or {}).items():
    data[name]["y"] = value
  return leaf(
    users=list(x), num_samples=[len(v) for v in x.values()], user_data=data
  )


@pytest.fixture
def save(tmp_path):
  def write(held, name="all.json"):
    file = tmp_path / name
    data = json.dumps(held).encode()
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return file

  return write


def plain(data):
  """Lists by user and field."""
  return {
    data.train.names[i]: {
      field: array.tolist() for field, array in data.train.client(i).items()
    }
    for i in range(data.train.num_clients)
  }


@pytest.mark.parametrize("name", ["all.json", "all.json.gz"])
def test_numbers(save, name):
  data = load_leaf_json(path=save(leaf(), name))
  assert (data.name, data.num_classes, data.example_shape) == ("all", 3, (2,))
  assert plain(data) == {
    "bo": {"x": [[1, 2], [3, 4]], "y": [0, 2]},
    "al": {"x": [[0.5, 1]], "y": [1]},
  }


@pytest.mark.parametrize(
  ("x", "y", "x_dtype", "y_dtype", "classes"),
  [
    ([[0], [255]], [0, 3], "uint8", "uint8", 4),
    ([[0.0], [7.0]], [0.0, 3.0], "uint8", "uint8", 4),
    ([[0], [256]], [0, 256], "float32", "int32", 257),
    ([[-1], [2]], [0, 1], "float32", "uint8", 2),
    ([[0.5], [2]], [0.5, 1], "float32", "float32", 0),
  ],
)
def test_dtypes_and_prepare(save, x, y, x_dtype, y_dtype, classes):
  file = save(of({"a": x, "b": x[:1]}, {"a": y, "b": y[:1]}))
  data = load_leaf_json(path=file)
  stored = data.train.examples
  assert (stored["x"].dtype, stored["y"].dtype) == (x_dtype, y_dtype)
  assert data.num_classes == classes
  ready = data.prepare({k: jnp.asarray(v) for k, v in stored.items()})
  assert ready["x"].dtype == jnp.float32
  assert ready["y"].dtype == (jnp.int32 if classes else jnp.float32)
  np.testing.assert_array_equal(ready["x"], [*x, x[0]])
  np.testing.assert_array_equal(ready["y"], [*y, y[0]])


@pytest.mark.parametrize(
  ("most", "dtype"), [(255, "uint8"), (256, "int32"), (2**24 + 1, "int32")]
)
def test_ids(save, most, dtype):
  """Tokens reach the model as whole numbers, whatever their size."""
  x, y = [[0, most], [7, 1]], [[1, 2], [3, most]]
  data = load_leaf_json(path=save(of({"a": x}, {"a": y})), inputs="ids")
  stored = data.train.examples
  assert (stored["x"].dtype, stored["y"].dtype) == (dtype, dtype)
  ready = data.prepare({k: jnp.asarray(v) for k, v in stored.items()})
  assert (ready["x"].dtype, ready["y"].dtype) == (jnp.int32, jnp.int32)
  np.testing.assert_array_equal(ready["x"], x)
  np.testing.assert_array_equal(ready["y"], y)
  assert data.num_classes == most + 1


@pytest.mark.parametrize("x", [2**24, 2**24 + 2, 2.0**70, -(2**31), -(2**24)])
def test_large_numbers_that_float32_holds(save, x):
  data = load_leaf_json(path=save(of({"a": [[x], [1]]})))
  assert data.train.examples["x"].dtype == np.float32
  assert data.train.examples["x"][0, 0] == x


def test_real_numbers_are_rounded(save):
  data = load_leaf_json(path=save(of({"a": [[0.1]], "b": [[2**24 + 1]]})))
  assert plain(data)["b"]["x"] == [[2**24]]


def test_labels_of_flute_and_no_labels(save):
  held = of({"a": [[1]], "b": [[2], [3]]})
  assert load_leaf_json(path=save(held)).num_classes == 0
  held["user_data_label"] = {"a": [4], "b": [5, 6]}
  data = load_leaf_json(path=save(held))
  assert data.num_classes == 7
  assert plain(data)["b"] == {"x": [[2], [3]], "y": [5, 6]}


def test_folder_and_splits(save, tmp_path):
  save(of({"a": [[1], [2]], "b": [[3]]}), "1.json")
  save(of({"c": [[4], [5]], "d": []}), "2.json.gz")
  (tmp_path / "notes.txt").write_text("no JSON")
  with pytest.warns(UserWarning, match=r"2.json.gz: user 'd': there"):
    data = load_leaf_json(path=tmp_path)
  assert data.train.names == ("a", "b", "c")  # d has nothing
  np.testing.assert_array_equal(data.train.examples["x"][:, 0], range(1, 6))
  with pytest.warns(UserWarning, match="who has none is left out"):
    data = load_leaf_json(
      path=tmp_path, min_examples=2, heldout_fraction=0.5, unseen_clients=1
    )
  assert data.seen
  assert data.unseen
  assert {data.train.names, data.unseen.names} == {("a",), ("c",)}
  assert data.seen.num_examples == 1


# --- text ---------------------------------------------------------------------


def test_text_without_labels_is_cut_into_next_characters(save):
  file = save(of({"a": ["abc", "d"], "b": ["ba"]}))
  data = load_leaf_json(path=file, sequence_length=3, vocabulary="dcba\n")
  assert (data.num_classes, data.example_shape) == (6, (3,))
  assert plain(data) == {  # abc\nd is 4 3 2 5 1
    "a": {"x": [[4, 3, 2], [5, 0, 0]], "y": [[3, 2, 5], [1, 0, 0]]},
    "b": {"x": [[3, 0, 0]], "y": [[4, 0, 0]]},
  }


@pytest.mark.parametrize("texts", [[""], ["z"]])
@pytest.mark.parametrize("vocabulary", [None, "ab"])
def test_users_without_a_next_character_are_left_out(save, texts, vocabulary):
  file = save(of({"a": ["ab"], "b": texts, "c": ["ba"]}))
  data = load_leaf_json(path=file, sequence_length=2, vocabulary=vocabulary)
  assert data.train.names == ("a", "c")
  assert data.num_classes == 3  # without z


def test_text_with_characters_as_labels(save):
  file = save(of({"a": ["ab", "bc"], "b": ["ca"]}, {"a": ["c", "a"], "b": "b"}))
  with pytest.raises(ValueError, match="user 'b': y: expected an array"):
    load_leaf_json(path=file)
  file = save(
    of({"a": ["ab", "b"], "b": ["cad"]}, {"a": ["c", "a"], "b": ["b"]})
  )
  data = load_leaf_json(path=file, sequence_length=2)
  assert data.num_classes == 4  # d is cut off
  assert plain(data) == {
    "a": {"x": [[1, 2], [2, 0]], "y": [3, 1]},
    "b": {"x": [[3, 1]], "y": [2]},
  }


def test_text_with_numbers_as_labels(save):
  file = save(of({"a": ["ab", ""], "b": ["c"]}, {"a": [0, 1], "b": [1]}))
  data = load_leaf_json(path=file, sequence_length=2)
  assert data.num_classes == 2
  stored = data.train.examples
  assert [str(stored[field].dtype) for field in "xy"] == ["uint8", "uint8"]
  assert plain(data)["a"] == {"x": [[1, 2], [0, 0]], "y": [0, 1]}
  ready = data.prepare({k: jnp.asarray(v) for k, v in stored.items()})
  assert (ready["x"].dtype, ready["y"].dtype) == (jnp.int32, jnp.int32)


def test_text_of_many_characters(save):
  text = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
  data = load_leaf_json(path=save(of({"a": [text]})), sequence_length=299)
  x = data.train.examples["x"]
  assert (str(x.dtype), data.num_classes) == ("uint16", 301)
  np.testing.assert_array_equal(x[0], range(1, 300))


# --- refused ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("held", "match"),
  [
    ([], "users: expected a JSON array"),
    (leaf(user_data=[]), "user_data: expected a JSON object"),
    (leaf(user_data_label=[]), "user_data_label: expected a JSON object"),
    (leaf(users=["bo", "cy"]), "'al' is in user_data, but not in users"),
    (
      leaf(users=["bo", "al", "cy"], num_samples=[2, 1, 1]),
      "'cy': expected an object in user_data, .* not",
    ),
    (leaf(users=["bo", "bo"]), "user 'bo' is twice in users"),
    (leaf(users=["bo", 3]), "user 3: expected a name"),
    (leaf(users=["al"], num_samples=[1]), "'bo' is in user_data, but not in"),
    (
      leaf(user_data_label={"cy": [1]}),
      "'cy' is in user_data_label, but not in user_data; expected",
    ),
    (leaf(num_samples=[2]), "num_samples: expected 2, one a user, found 1"),
    (
      leaf(user_data={"bo": {"x": [[1], [2]]}, "al": {"x": []}}),
      "'al': num_samples is 1; expected 0, the length",
    ),
    (of({"a": [[1], [2]]}, {"a": [1]}), "'a': y has 1 entries; expected 2, as"),
    (
      of({"a": [[1]], "b": [[1]]}, {"a": [1]}),
      "'b': y is missing; expected it",
    ),
    (of({"a": ["t"], "b": ["t"]}, {"a": [1]}), "'b': y is missing"),
    (of({"a": [[1], [2, 3]]}), "'a': x: expected entries of one shape"),
    (of({"a": [[1]]}, {"a": ["cat"]}), "'a': y: expected numbers"),
    (of({"a": [[1]], "b": ["t"]}), "'a': x holds what is no text, .*'b' text"),
    (of({"a": ["t"]}, {"a": ["no"]}), "'a': y holds 'no'; expected one char"),
    (of({"a": ["t"], "b": [""]}), "There is no client with examples"),
    (of({"a": [[1]], "b": [[2**24 + 1]]}), "'b': x holds 16777217; float32"),
    (of({"a": [[2.0**24 + 1]]}), "'a': x holds 16777217.0; float32 would"),
    (of({"a": [[2**63 - 1]]}), "'a': x holds 9223372036854775807; float32"),
    (of({"a": [[-(2**31) + 1]]}), "'a': x holds -2147483647; float32 would"),
    (of({"a": {"x": 1}}), "'a': x: expected an array"),
    (of({"a": [[1]], "b": [[1, 2]]}), r"client 1 \('b'\): one 'x' is"),
    (of({"a": [[float("nan")]]}), "client 0 .*holds nan"),
    (of({"a": [[1]]}, {"a": [-1]}), "holds label -1"),
  ],
)
def test_refuses(save, held, match):
  with pytest.raises(ValueError, match=match) as caught:
    load_leaf_json(path=save(held))
  of_json = "expected" in match or "twice" in match
  assert not of_json or re.search(r"all\.json", str(caught.value))


@pytest.mark.parametrize(
  ("held", "options", "match"),
  [
    (leaf(), {"vocabulary": "a"}, "data.vocabulary is for text"),
    (leaf(), {"sequence_length": 80}, "data.sequence_length is for text"),
    (
      of({"a": ["to"]}),
      {"vocabulary": "t"},
      "'a' has the character 'o', which",
    ),
    (of({"a": ["to"]}), {"vocabulary": "tot"}, "holds 't' twice"),
    (of({"a": ["to"]}), {"num_classes": 5}, "=5, but labels are 2 char"),
    (of({"a": ["to"]}), {"sequence_length": 0}, "sequence_length=0 is out of"),
    (leaf(), {"num_classes": 2}, "holds label 2; .* or raise num_classes"),
    (
      leaf(),
      {"inputs": "id"},
      "data.inputs='id' is unknown. Did you mean 'ids",
    ),
    (leaf(), {"inputs": "ids"}, "'al': x holds 0.5; expected ids, whole"),
    (of({"a": [[-1]]}), {"inputs": "ids"}, "'a': x holds -1; expected ids"),
    (of({"a": [[2**31]]}), {"inputs": "ids"}, "'a': x holds 2147483648; exp"),
    (of({"a": ["to"]}), {"inputs": "ids"}, "data.inputs='ids' is for numbers"),
  ],
)
def test_refuses_options(save, held, options, match):
  with pytest.raises(ValueError, match=match):
    load_leaf_json(path=save(held), **options)


def test_refuses_damaged_files(save, tmp_path):
  file = save(leaf(), "all.json.gz")
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(ValueError, match=r"all.json.gz is damaged"):
    load_leaf_json(path=file)
  file.write_bytes(b'{"users": [')
  with pytest.raises(ValueError, match=r"all.json.gz cannot be read as JSON"):
    load_leaf_json(path=file)
  file.write_bytes(b"\xff\xfe\xfd")
  with pytest.raises(ValueError, match=r"all.json.gz cannot be read as JSON"):
    load_leaf_json(path=file)
  file.unlink()
  with pytest.raises(ValueError, match=r"holds no .json or .json.gz"):
    load_leaf_json(path=tmp_path)
  save(of({"a": [[1]]}), "1.json")
  save(of({"a": [[1]]}), "2.json")
  with pytest.raises(ValueError, match=r"2.json: user 'a' is .*/1.json: user"):
    load_leaf_json(path=tmp_path)


def test_real(data_folder):
  file = data_folder / "tinyshakespeare" / "roles_leaf.json.gz"
  data = load_leaf_json(path=file)
  assert (data.name, data.train.num_clients) == ("roles_leaf", 180)
  held = json.loads(gzip.decompress(file.read_bytes()))
  lengths = [len("\n".join(held["user_data"][u]["x"])) for u in held["users"]]
  assert data.train.names == tuple(held["users"])
  np.testing.assert_array_equal(
    data.train.sizes, [-(-(n - 1) // 80) for n in lengths]
  )
