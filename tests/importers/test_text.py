"""Text as ids, against examples worked out by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.data import open_store
from fedjax_sim.data.importers import (
  Block,
  Characters,
  Words,
  examples,
  import_store,
)
from fedjax_sim.data.importers.blocks import grouped


def stored(path, pairs, **options):
  import_store(path, {"train": examples(pairs)}, **options)
  return open_store(path)


def test_characters_and_the_next_one(tmp_path):
  pairs = [("a", {"x": "abc"}), ("a", {"x": "ba"}), ("b", {"x": "c"})]
  data = stored(tmp_path / "s", pairs, text=Characters("\nabc", 4))
  assert data.num_classes == 5
  assert data.train.num_clients == 1  # of "b" there is no next one
  # abc\nba
  np.testing.assert_array_equal(
    data.train.examples["x"], [[2, 3, 4, 1], [3, 0, 0, 0]]
  )
  np.testing.assert_array_equal(
    data.train.examples["y"], [[3, 4, 1, 3], [2, 0, 0, 0]]
  )


def test_characters_with_characters_as_labels(tmp_path):
  pairs = [("a", {"x": "abcd", "y": "e"}), ("b", {"x": "d", "y": "a"})]
  data = stored(tmp_path / "s", pairs, text="characters", sequence_length=3)
  assert data.num_classes == 6
  np.testing.assert_array_equal(
    data.train.examples["x"], [[1, 2, 3], [4, 0, 0]]
  )
  np.testing.assert_array_equal(data.train.examples["y"], [5, 1])


@pytest.mark.parametrize("text", ["characters", "words"])
def test_text_with_numbers_as_labels(tmp_path, text):
  pairs = [("a", {"x": "b a", "y": 2}), ("a", {"x": "b", "y": 0})]
  data = stored(tmp_path / "s", pairs, text=text, sequence_length=4)
  assert data.num_classes == 3
  x = {
    "characters": [[3, 1, 2, 0], [3, 0, 0, 0]],
    "words": [[4, 5, 0, 0], [4, 0, 0, 0]],
  }
  np.testing.assert_array_equal(data.train.examples["x"], x[text])
  np.testing.assert_array_equal(data.train.examples["y"], [2, 0])


def test_no_more_words_than_asked_for(tmp_path):
  pairs = [("a", {"x": "b a a c"}), ("b", {"x": ""})]
  data = stored(
    tmp_path / "s", pairs, text="words", vocabulary_size=1, sequence_length=6
  )
  assert data.num_classes == 5
  assert data.train.num_clients == 1
  np.testing.assert_array_equal(data.train.examples["x"], [[2, 1, 4, 4, 1, 0]])
  np.testing.assert_array_equal(data.train.examples["y"], [[1, 4, 4, 1, 3, 0]])


@pytest.mark.parametrize(
  ("pair", "options", "message"),
  [
    ({"x": "a"}, {"text": "letters"}, "text='letters' is unknown"),
    ({"x": 1}, {"text": "characters"}, "x is no text"),
    ({"x": 1}, {"text": "words"}, "x is no text"),
    ({"x": "ab"}, {"text": Characters("a")}, "character 'b', which"),
    ({"x": "a", "y": "bc"}, {"text": Characters("abc")}, "y holds 'bc'"),
    ({"x": "a", "y": "b"}, {"text": Words(["a"])}, "y holds text; give labels"),
    (
      {"x": ["a", "b"]},
      {"text": "words"},
      "x: expected numbers, or for x text",
    ),
    ({"x": "a", "w": 1}, {"text": "words"}, "field 'w' is there beside x and"),
    ({"x": "a"}, {}, "field 'x' holds text, first 'a'"),
    (
      {"x": "a"},
      {"text": "words", "vocabulary_size": 0},
      "vocabulary_size=0",
    ),
    (
      {"x": "a"},
      {"text": "words", "sequence_length": 0},
      "sequence_length=0",
    ),
  ],
)
def test_what_is_refused(tmp_path, pair, options, message):
  with pytest.raises(ValueError, match=message):
    stored(tmp_path / "s", [("a", pair)], **options)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["characters", "words"])
@pytest.mark.parametrize(
  ("label", "dtype", "stored_as"),
  [(0.7, None, "float32"), (2**33, "int64", "int64"), (3, "uint8", "uint8")],
)
def test_numbers_as_labels_stay(tmp_path, text, label, dtype, stored_as):
  data = stored(
    tmp_path / "s",
    [("a", {"x": "b c", "y": label})],
    text=text,
    dtypes={"y": dtype} if dtype else None,
  )
  found = data.train.examples["y"]
  assert found.dtype == stored_as
  assert found[0] == np.dtype(stored_as).type(label)
  assert data.num_classes == (0 if label == 0.7 else label + 1)


@given(
  st.lists(st.tuples(st.sampled_from("abc"), st.text("xyz", max_size=9))),
  st.integers(1, 5),
  st.integers(1, 4),
)
def test_a_text_may_come_in_pieces(rows, length, at_once):
  """As if every client's texts had come at once."""
  whole: dict[str, list[str]] = {}
  for name, text in rows:
    whole.setdefault(name, []).append(text)
  texts = Characters("\nxyz", length)

  def of(blocks):
    found: dict[str, list[list[int]]] = {}
    for block in texts.blocks(blocks):
      ends = np.cumsum([0, *np.asarray(block.sizes)])
      for i, name in enumerate(block.names):
        part = block.examples["x"][ends[i] : ends[i + 1]]
        found.setdefault(name, []).extend(part.tolist())
    return found

  pieces = [
    grouped(
      "here",
      [name for name, _ in rows[i : i + at_once]],
      {"x": np.array([text for _, text in rows[i : i + at_once]], object)},
    )
    for i in range(0, len(rows), at_once)
  ]
  at_last = [
    Block("here", [n], [len(t)], {"x": np.array(t, object)}, whole=True)
    for n, t in whole.items()
  ]
  assert of(pieces) == of(at_last)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Words(["a", "a"]), "holds a word twice"),
    (lambda: Characters(["ab"]), "no single character"),
  ],
)
def test_wrong_vocabularies(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_labels_of_two_kinds(tmp_path):
  pairs: Any = [("a", {"x": "b", "y": 1}), ("c", {"x": "b", "y": "d"})]
  blocks = [block for pair in pairs for block in examples([pair])]
  with pytest.raises(
    ValueError, match="'c': field 'y' holds text, and numbers"
  ):
    import_store(tmp_path / "s", {"train": blocks}, text=Characters("bd"))


def test_an_iterator_is_read_once(tmp_path):
  pairs = (("a", {"x": text}) for text in ("ab", "b"))
  with pytest.raises(ValueError, match="of 'train' can be read once only"):
    import_store(tmp_path / "s", {"train": examples(pairs)}, text="words")
  block = Block("here", ["a"], [1], {"x": np.array(["ab"], object)})
  with pytest.raises(ValueError, match="of 'train' can be read once only"):
    import_store(tmp_path / "s", {"train": iter([block])}, text="words")
  import_store(tmp_path / "s", {"train": iter([block])}, text=Words(["ab"]))
  assert open_store(tmp_path / "s").num_classes == 5
