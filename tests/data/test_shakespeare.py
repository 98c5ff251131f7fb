"""Speaking roles as sequences of characters: cut and numbered as told."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import load_shakespeare

ROLES = {
  "First Citizen": ["Speak, speak.", "No more\ntalking."],
  "HAMLET": ["Words, words, words."],
  "Messenger": ["My lord?"],
}


@pytest.fixture
def save(tmp_path):
  (tmp_path / "tinyshakespeare").mkdir()

  def write(roles=ROLES):
    held = {
      "users": list(roles),
      "num_samples": [len(x) for x in roles.values()],
      "user_data": {role: {"x": x} for role, x in roles.items()},
    }
    file = tmp_path / "tinyshakespeare" / "roles_leaf.json.gz"
    file.write_bytes(gzip.compress(json.dumps(held).encode()))
    return tmp_path

  return write


def load(path, **options):
  fixed = {"min_characters": 0, "heldout_fraction": 0, "sequence_length": 7}
  return load_shakespeare(path=path, **fixed | options)


def text_of(ids, vocabulary):
  return "".join(vocabulary[i - 1] for i in np.ravel(ids) if i)


def test_a_text_is_cut_into_sequences_and_what_follows(save):
  data = load(save())
  texts = {role: "\n".join(x) for role, x in ROLES.items()}
  vocabulary = sorted(set("".join(texts.values())))
  assert (data.num_classes, data.example_shape) == (len(vocabulary) + 1, (7,))
  assert data.train.names == tuple(ROLES)
  for i, text in enumerate(texts.values()):
    client = data.train.client(i)
    assert text_of(client["x"], vocabulary) == text[:-1]
    assert text_of(client["y"], vocabulary) == text[1:]
    assert len(client["x"]) == -(-(len(text) - 1) // 7)
    # Padding is at the end only, and the same in both.
    flat = client["x"].ravel()
    assert (flat > 0).tolist() == [i < len(text) - 1 for i in range(flat.size)]
    np.testing.assert_array_equal(client["x"] > 0, client["y"] > 0)


def test_a_vocabulary_gives_the_ids(save):
  text = "abcab"
  data = load(save({"a": [text]}), vocabulary="cbax", sequence_length=4)
  assert data.num_classes == 5
  assert data.train.client(0)["x"].tolist() == [[3, 2, 1, 3]]
  assert data.train.client(0)["y"].tolist() == [[2, 1, 3, 2]]


def test_short_roles_are_left_out(save):
  lengths = {role: len("\n".join(x)) for role, x in ROLES.items()}
  data = load(save(), min_characters=lengths["HAMLET"])
  assert data.train.names == ("First Citizen", "HAMLET")
  data = load(save(), min_characters=lengths["HAMLET"] + 1)
  assert data.train.names == ("First Citizen",)


@pytest.mark.parametrize("speeches", [[""], ["O"]])
@pytest.mark.parametrize("fewest", [0, 1])
def test_roles_without_a_next_character_are_left_out(save, speeches, fewest):
  path = save({"GHOST": speeches, "a": ["abc"]})
  data = load(path, min_characters=fewest)
  assert data.train.names == ("a",)
  assert data.num_classes == 4


def test_prepare(save):
  data = load(save())
  stored = data.train.examples
  assert [str(stored[field].dtype) for field in "xy"] == ["uint8", "uint8"]
  ready = data.prepare({k: jnp.asarray(v) for k, v in stored.items()})
  for field in "xy":
    assert ready[field].dtype == jnp.int32
    np.testing.assert_array_equal(ready[field], stored[field])


@pytest.mark.parametrize(
  ("roles", "options", "match"),
  [
    ({"GHOST": ["O"]}, {}, "min_characters=0 leaves no role of .*needs 2 char"),
    (ROLES | {"GHOST": [[1]]}, {}, r"'GHOST': x holds \[1\]; expected text"),
    (ROLES, {"vocabulary": "abc"}, "user 'First Citizen' has the character"),
    (ROLES, {"min_characters": 99}, "min_characters=99 leaves no role"),
    (ROLES, {"min_characters": -1}, "min_characters=-1 is out of range"),
    (ROLES, {"sequence_length": 0}, "sequence_length=0 is out of range"),
  ],
)
def test_refuses(save, roles, options, match):
  with pytest.raises(ValueError, match=match):
    load(save(roles), **options)


def test_refuses_a_folder_without_the_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no roles_leaf.json.gz"):
    load(tmp_path)


# --- the real file ------------------------------------------------------------


def test_real(data_folder):
  data = load_shakespeare(path=data_folder, heldout_fraction=0)
  assert (data.train.num_clients, data.example_shape) == (180, (80,))
  assert data.train.names
  assert data.num_classes == 65  # 64 characters of the roles, and padding
  file = data_folder / "tinyshakespeare" / "roles_leaf.json.gz"
  held = json.loads(gzip.decompress(file.read_bytes()))["user_data"]
  texts = {role: "\n".join(held[role]["x"]) for role in data.train.names}
  vocabulary = sorted(set("".join(texts.values())))
  for i, text in enumerate(texts.values()):
    client = data.train.client(i)
    assert text_of(client["x"], vocabulary) == text[:-1]
    assert text_of(client["y"], vocabulary) == text[1:]


def test_real_splits_lose_and_double_nothing(data_folder):
  whole = load_shakespeare(path=data_folder, heldout_fraction=0)
  data = load_shakespeare(path=data_folder, unseen_clients=20)
  assert data.seen
  assert data.unseen
  assert (data.train.num_clients, data.unseen.num_clients) == (160, 20)
  sets = [data.train.examples, data.seen.examples, data.unseen.examples]
  pairs = lambda part: [
    bytes(x) + bytes(y) for x, y in zip(part["x"], part["y"], strict=True)
  ]
  got = sorted(pair for part in sets for pair in pairs(part))
  assert got == sorted(pairs(whole.train.examples))
