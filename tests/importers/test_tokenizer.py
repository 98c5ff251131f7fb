"""Text as tokens, against examples worked out by hand."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from fedjax_sim.cli.main import main
from fedjax_sim.data import open_store, vocabulary_of
from fedjax_sim.data.importers import Tokens, examples, import_store
from fedjax_sim.data.importers.blocks import grouped

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A file of a tokenizer that knows a to d, and begins and ends a text."""
  return written(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", WORDS)


def written(path, words):
  made = Tokenizer(
    WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
  )
  made.pre_tokenizer = Whitespace()
  made.post_processor = TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  made.enable_truncation(3)  # a store's sequences have their own length
  made.save(str(path))
  return path


def test_texts_of_a_client_are_joined_and_cut(tokenizer, tmp_path):
  pairs = [("ann", {"x": "a b"}), ("ann", {"x": "z"}), ("bob", {"x": "c"})]
  import_store(
    tmp_path / "s", {"train": examples(pairs)}, text=Tokens(tokenizer, 4)
  )
  data = open_store(tmp_path / "s")
  assert data.num_classes == 8
  assert vocabulary_of(tmp_path / "s") == WORDS
  ann, bob = data.train.client(0), data.train.client(1)
  # 2 4 5 3 | 2 1 3
  np.testing.assert_array_equal(ann["x"], [[2, 4, 5, 3], [2, 1, 3, 0]])
  np.testing.assert_array_equal(ann["y"], [[4, 5, 3, 2], [1, 3, 0, 0]])
  np.testing.assert_array_equal(bob["x"], [[2, 6, 3, 0]])
  np.testing.assert_array_equal(bob["y"], [[6, 3, 0, 0]])


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_clients_texts_may_come_in_pieces(tokenizer, at_once, length):
  rows = [
    ("ann", "a b c"),
    ("bob", "d"),
    ("ann", "a"),
    ("ann", "c c"),
    ("b", ""),
  ]
  texts = Tokens(tokenizer, length)

  def of(blocks):
    found: dict[str, list[list[int]]] = {}
    for block in texts.blocks(blocks):
      ends = np.cumsum([0, *np.asarray(block.sizes)])
      for i, name in enumerate(block.names):
        part = slice(ends[i], ends[i + 1])
        pair = np.stack([block.examples[k][part] for k in ("x", "y")], 1)
        found.setdefault(name, []).extend(pair.tolist())
    return found

  def blocks(size, whole):
    for i in range(0, len(rows), size):
      names, texts = zip(*rows[i : i + size], strict=True)
      block = grouped("here", names, {"x": np.array(texts, object)})
      yield block._replace(whole=whole)

  assert of(blocks(at_once, False)) == of(blocks(len(rows), True))


def test_one_text_an_example(tokenizer, tmp_path):
  pairs = [("ann", {"x": "a b c d"}), ("ann", {"x": "c"})]
  text = Tokens(tokenizer.parent, 4, joined=False)
  import_store(tmp_path / "s", {"train": examples(pairs)}, text=text)
  held = open_store(tmp_path / "s").train.examples
  np.testing.assert_array_equal(held["x"], [[2, 4, 5, 6], [2, 6, 3, 0]])
  np.testing.assert_array_equal(held["y"], [[4, 5, 6, 7], [6, 3, 0, 0]])


def test_labels_that_are_classes_stay(tokenizer, tmp_path):
  pairs = [("ann", {"x": "a b c d", "y": 2}), ("bob", {"x": "", "y": 0})]
  text = Tokens(tokenizer, 4)
  import_store(tmp_path / "s", {"train": examples(pairs)}, text=text)
  data = open_store(tmp_path / "s")
  np.testing.assert_array_equal(
    data.train.examples["x"], [[2, 4, 5, 6], [2, 3, 0, 0]]
  )
  assert data.train.examples["y"].tolist() == [2, 0]
  assert data.num_classes == 3


def test_another_token_for_padding(tokenizer, tmp_path):
  file = written(tmp_path / "own.json", ("[X]", *WORDS[1:]))
  with pytest.raises(
    ValueError, match=r"has no token for padding; name one of"
  ):
    Tokens(file)
  assert Tokens(file, padding_token="d").padding == 7
  with pytest.raises(
    ValueError, match=r"padding_token='e' is no token of .*\[X"
  ):
    Tokens(file, padding_token="e")
  padded = Tokenizer.from_file(str(file))
  padded.enable_padding(pad_id=5, pad_token="b")
  padded.save(str(file))
  assert Tokens(file).padding == 5


def test_what_is_refused(tokenizer, tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no such file"):
    Tokens(tmp_path / "tokenizer.json")
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="is no tokenizer of the library"):
    Tokens(tmp_path)
  with pytest.raises(
    ValueError, match=r"text='tokens' needs a tokenizer; give"
  ):
    import_store(
      tmp_path / "s", {"train": examples([("a", {"x": "a"})])}, text="tokens"
    )
  with pytest.raises(ValueError, match="y holds text; give labels that are"):
    import_store(
      tmp_path / "s",
      {"train": examples([("a", {"x": "a", "y": "b"})])},
      text=Tokens(tokenizer),
    )
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--text=tokens"], "--tokenizer=... is missing: --text=tokens needs"),
    (["--text=words", "--tokenizer=T"], "--tokenizer=T is of no use with"),
    (["--text=tokens", "--vocabulary-size=9"], "--vocabulary-size=9 is of no"),
    (["--tokenizer=T"], "--tokenizer is for text"),
    (["--text=tokens", "--tokenizer=no.json"], "--tokenizer='no.json': there"),
    (
      ["--text=tokens", "--tokenizer=T", "--padding-token=e"],
      "--padding-token='e' is no token",
    ),
    (["--text=tokens", "--tokenizer=T", "--sequence-length=0"], "length=0 is"),
    (["--text=tokens", "--tokenizer=T"], ""),
    (["--text=token_texts", "--tokenizer=T", "--sequence-length=2"], ""),
  ],
)
def test_the_command(tokenizer, tmp_path, capsys, flags, said):
  rows = [{"client": "ann", "x": "a b"}, {"client": "bob", "x": "c"}]
  source = tmp_path / "rows.jsonl"
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  given = [flag.replace("=T", f"={tokenizer}") for flag in flags]
  told = said.replace("=T", f"={tokenizer}")
  store = tmp_path / "s"
  places = [f"--train={source}", f"--store={store}"]
  code = main(["data", "import", "--format=json_lines", *places, *given])
  err = capsys.readouterr().err
  if told:
    assert code == 2
    assert told in err
    assert not store.exists()
    return
  assert code == 0, err
  shape = open_store(store).train.examples["x"].shape
  assert shape == ((2, 128) if "tokens" in flags[0] else (2, 2))
