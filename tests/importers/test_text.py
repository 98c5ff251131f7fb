"""Text as ids, against examples worked out by hand."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.cli.main import main
from fedjax_sim.data import open_store, vocabulary_of
from fedjax_sim.data.importers import (
  Block,
  Characters,
  TffCharacters,
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
    (
      {"x": "a", "y": 1},
      {"text": Words(["a"], min_characters=2)},
      "min_characters=2 is for texts without labels",
    ),
    ({"x": "a", "y": 1}, {"text": "tff_characters"}, "y is there beside the"),
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
    (lambda: TffCharacters("aa"), "holds a character twice"),
    (lambda: Words(["a"], min_characters=-1), "min_characters=-1 is out of"),
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


# --- as TFF and FLUTE have it -------------------------------------------------


def test_snippets_as_tff_has_them(tmp_path):
  """1 to 86 are characters, 87 begins, 88 ends, 89 is any other."""
  pairs = [("a", {"x": "dh"}), ("a", {"x": "l\r\u00e9\tpt"}), ("b", {"x": ""})]
  data = stored(tmp_path / "s", pairs, text="tff_characters", sequence_length=4)
  assert data.num_classes == 90
  assert len(vocabulary_of(tmp_path / "s") or ()) == 86
  train = data.train
  assert train.sizes.tolist() == [3, 1]
  # Pieces of five: the first four, and the last four.
  pieces = [
    [87, 1, 2, 88, 0],
    [87, 3, 86, 89, 89],
    [4, 5, 88, 0, 0],
    [87, 88, 0, 0, 0],
  ]
  np.testing.assert_array_equal(train.examples["x"], np.array(pieces)[:, :-1])
  np.testing.assert_array_equal(train.examples["y"], np.array(pieces)[:, 1:])


def test_sentences_as_flute_has_them(tmp_path):
  """Words of a file's lines, whatever their case; every one is a label."""
  file = tmp_path / "reddit.vocab"
  file.write_text("<OOV>\nthe\nParis\nUSA\nThe\n")
  lines = ["The THE paris usa in", "no", "the the the the the the", "of"]
  told = [{"user": "a", "x": line} for line in lines]
  source = tmp_path / "a.jsonl"
  source.write_text("\n".join(map(json.dumps, told)))
  given = ["data", "import", "--format=json_lines", f"--train={source}"]
  given += ["--client=user", "--text=words", f"--vocabulary={file}"]
  flags = ["--unmarked", "--case-backoff", "--sequence-length=5"]
  flags += ["--min-characters=3"]
  assert main([*given, *flags, f"--store={tmp_path / 's'}"]) == 0
  data = open_store(tmp_path / "s")
  assert data.num_classes == 6  # an id more than the file has lines
  y = [[5, 2, 3, 4, 1], [2, 2, 2, 2, 2]]
  np.testing.assert_array_equal(data.train.examples["y"], y)
  x = [[0, 5, 2, 3, 4], [0, 2, 2, 2, 2]]
  np.testing.assert_array_equal(data.train.examples["x"], x)
  # The store's own vocabulary does the same.
  given[-1] = f"--vocabulary={tmp_path / 's'}"
  assert main([*given, *flags, f"--store={tmp_path / 't'}"]) == 0
  again = open_store(tmp_path / "t").train.examples
  np.testing.assert_array_equal(again["y"], y)
  # Without the flags there are a beginning and an end, and cases count.
  assert main([*given, f"--store={tmp_path / 'u'}"]) == 0
  marked = open_store(tmp_path / "u").train.examples
  assert marked["x"][0, :6].tolist() == [2, 7, 1, 1, 1, 1]
  assert len(marked["x"]) == 4


def test_words_that_are_found_take_options_too(tmp_path):
  data = stored(
    tmp_path / "s",
    [("a", {"x": "b b c"}), ("a", {"x": "b"})],
    text="words",
    sequence_length=3,
    word_options={"marked": False, "min_characters": 2},
  )
  np.testing.assert_array_equal(data.train.examples["y"], [[2, 2, 3]])


@pytest.mark.parametrize(
  ("name", "content", "flags", "message"),
  [
    ("a.txt", "<OOV>\na b\n", [], "line 2 is 'a b'; give one word"),
    ("a.txt", "a\n\nb", [], "line 2 is ''; give one word"),
    ("a.txt", "a\xff", [], "a.txt is no UTF-8"),
    ("a.txt", "a\na", [], "vocabulary holds a word twice"),
    ("a.json", "a", [], "a.json is no JSON"),
    ("a.txt", "a", ["--min-characters=0"], "min-characters=0 is out of"),
    ("", "", ["--text=characters", "--unmarked"], "--unmarked is for --text=w"),
    ("", "", ["--text=", "--case-backoff"], "--case-backoff is for --text=w"),
    ("", "", ["--negatives=3"], "--negatives=3 is for mind, and not for npz"),
    ("", "", ["--news=a.npz"], "--news=a.npz is for mind; leave it out"),
    ("", "", ["--delimiter=;"], "--delimiter=; is for csv, and not for npz"),
  ],
)
def test_flags_that_are_refused(
  tmp_path, capsys, name, content, flags, message
):
  if name:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    flags = [f"--vocabulary={tmp_path / name}", *flags]
  np.savez(tmp_path / "a.npz", x=np.array(["a b"]), client=np.array(["c"]))
  given = ["data", "import", "--format=npz", f"--train={tmp_path / 'a.npz'}"]
  given += [f"--store={tmp_path / 's'}", "--text=words"]
  assert main([*given, *flags]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "s").exists()
