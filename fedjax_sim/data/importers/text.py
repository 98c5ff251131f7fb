"""Text as ids, at import: characters or words, with what follows each.

Without labels a text becomes sequences to predict the next id of, as in McMahan
et al. (2017, arXiv 1602.05629; characters of Shakespeare) and Reddi et al.
(2021, arXiv 2003.00295; words of Stack Overflow).
"""

from __future__ import annotations

import abc
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.importers.blocks import Block
from fedjax_sim.data.leaf_format import User
from fedjax_sim.data.text import (
  PADDING,
  UNKNOWN,
  encode,
  labelled_text,
  next_characters,
)

BEGIN, END = 2, 3  # words' ids go on from these
# The 86 characters of Shakespeare in the order of TensorFlow Federated's
# tutorial on text generation.
TFF_CHARACTERS = (
  "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquy"
  "AEIMQUY]!%)-159\r"
)
Ids = tuple[np.ndarray, np.ndarray | None]  # x, and y where it is ids, too


class Text(abc.ABC):
  """A conversion of the text "x" of blocks to ids.

  Attributes:
    vocabulary: the characters or words that have ids of their own.
    length: ids of an example; shorter ones are padded with 0.
    usual_length: the length if none is given.
    num_classes: how many classes labels have that are ids, those of padding and
      of other reserved ids included.
  """

  vocabulary: tuple[str, ...]
  num_classes: int
  usual_length: int

  def __init__(self, vocabulary: Sequence[str], length: int | None = None):
    self.vocabulary = tuple(vocabulary)
    self.length = validate.integer(
      "sequence_length",
      self.usual_length if length is None else length,
      le=2**16,
    )

  def blocks(self, given: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks of a split with ids, int32, instead of text.

    Args:
      given: blocks with "x", text, and perhaps "y": numbers, which stay as they
        are, or with `Characters` a character an example.

    Raises:
      ValueError: "x" is no text, labels are of another kind, or there are
        fields beside the two.
    """
    for block in given:
      if not block.names:
        continue
      pairs = [self._ids_of(user) for user in users_of(block)]
      examples = {"x": _joined([x for x, _ in pairs])}
      labels = [y for _, y in pairs if y is not None]
      if labels:
        examples["y"] = _joined(labels)
      elif "y" in block.examples:
        examples["y"] = block.examples["y"]
      yield block._replace(
        sizes=[len(x) for x, _ in pairs], examples=examples, rows=None
      )

  @abc.abstractmethod
  def _ids_of(self, user: User) -> Ids:
    """Return x, shape=(examples, length), and y, or None where y is numbers."""


class Characters(Text):
  """Ids of characters: 1 for the first of the vocabulary, and so on.

  Without labels a client's texts are joined by line breaks and cut into
  sequences. Else an example is the beginning of a text, and labels are numbers,
  or characters.
  """

  usual_length = 80

  def __init__(self, vocabulary: Sequence[str], length: int | None = None):
    super().__init__(vocabulary, length)
    self._letters = "".join(vocabulary)
    if len(self._letters) != len(self.vocabulary):
      raise ValueError(
        "vocabulary holds what is no single character; give a list of them."
      )
    self.num_classes = len(vocabulary) + 1

  def blocks(self, given: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks with ids instead of text; see `Text.blocks`.

    The end of a text that is shorter than a sequence is kept for the client's
    next block.
    """
    ends: dict[str, str] = {}
    where = ""
    for block in given:
      if "y" in block.examples:
        yield from super().blocks([block])
        continue
      where = block.where
      users = dict(zip(block.names, users_of(block), strict=True))
      texts = {}
      for name, user in users.items():
        text = "\n".join([*([ends.pop(name)] if name in ends else []), *user.x])
        if block.whole:
          texts[name] = text
          continue
        # The last character of a sequence is the first of the next one.
        rows = (len(text) - 1) // self.length
        texts[name] = text[: rows * self.length + 1] if rows else ""
        ends[name] = text[rows * self.length :] if rows else text
      yield self._of_texts(block, texts)
    if ends:
      empty: dict[str, np.ndarray] = {}
      yield self._of_texts(Block(where, [], [], empty), ends)

  def _of_texts(self, block: Block, texts: dict[str, str]) -> Block:
    texts = {name: text for name, text in texts.items() if len(text) > 1}
    told = {name: f"{block.where}: client {name!r}" for name in texts}
    ids, _ = encode(texts, self._letters, told)
    made = [next_characters(ids[name], self.length) for name in texts]
    none = np.zeros((0, self.length), np.int32)
    return block._replace(
      rows=None,
      names=list(texts),
      sizes=[len(held["x"]) for held in made],
      examples={
        k: _joined([none, *(held[k] for held in made)]) for k in ("x", "y")
      },
    )

  def _ids_of(self, user: User) -> Ids:
    y = user.y or []
    letters = any(isinstance(label, str) for label in y)
    user = user._replace(y=y if letters else [0] * len(y))
    found, _ = labelled_text({"": user}, self.length, self._letters)
    return found[""]["x"], found[""]["y"] if letters else None


class TffCharacters(Text):
  """Ids of characters as TensorFlow Federated and FLUTE have Shakespeare.

  Each text by itself, with a beginning and an end, is padded to a multiple of
  `length` + 1 and cut into such pieces: x is all of a piece but its last id, y
  all but its first. Ids are 1 for the first character of the vocabulary and so
  on; then come the beginning, the end, and all other characters. Labels are not
  taken.
  """

  usual_length = 80

  def __init__(
    self, vocabulary: Sequence[str] = TFF_CHARACTERS, length: int | None = None
  ):
    super().__init__(vocabulary, length)
    self._ids = _numbered(self.vocabulary, "character", 1)
    self._begin = len(self.vocabulary) + 1
    self.num_classes = len(self.vocabulary) + 4

  def _ids_of(self, user: User) -> Ids:
    if user.y is not None:
      raise ValueError(
        f"{user.where}: y is there beside the text; name x alone in fields."
      )
    begin, end, other = range(self._begin, self._begin + 3)
    size = self.length + 1
    ids: list[int] = []
    for text in user.x:
      ids += [begin, *(self._ids.get(c, other) for c in text), end]
      ids += [PADDING] * (-len(ids) % size)
    pieces = np.array(ids, np.int32).reshape(-1, size)
    return pieces[:, :-1], pieces[:, 1:]


class Words(Text):
  """Ids of words, between spaces: 4 for the first of the vocabulary, and so on.

  1 is any other word, 2 begins and 3 ends a text. Without labels an example is
  a text, from its beginning on, and y the next word; a text without words is
  left out.

  Args:
    vocabulary: the words.
    length: words of an example, at most.
    marked: whether texts have ids for beginning and end; without, words have
      ids from 2 on, and 0 stands before the first word.
    case_backoff: whether a word that the vocabulary lacks is looked for in
      lower case, with capital letters at its beginning, and in upper case.
    min_characters: shorter texts are left out.
  """

  usual_length = 20

  def __init__(
    self,
    vocabulary: Sequence[str],
    length: int | None = None,
    *,
    marked: bool = True,
    case_backoff: bool = False,
    min_characters: int = 0,
  ):
    super().__init__(vocabulary, length)
    first = (END if marked else UNKNOWN) + 1
    self._ids = _numbered(self.vocabulary, "word", first)
    self._begin, self._end = ([BEGIN], [END]) if marked else ([PADDING], [])
    self._backoff = (str.lower, str.title, str.upper) if case_backoff else ()
    self._least = validate.integer("min_characters", min_characters, ge=0)
    self.num_classes = len(vocabulary) + first

  def _id_of(self, word: str) -> int:
    forms = (word, *(form(word) for form in self._backoff))
    return next((self._ids[w] for w in forms if w in self._ids), UNKNOWN)

  def _ids_of(self, user: User) -> Ids:
    if user.y is not None:
      if any(isinstance(label, str) for label in user.y):
        raise ValueError(
          f"{user.where}: y holds text; give labels that are numbers, or a map"
          " that makes them."
        )
      if self._least:
        raise ValueError(
          f"{user.where}: min_characters={self._least} is for texts without"
          " labels; leave it out."
        )
      return self._padded([self._row(text) for text in user.x]), None
    rows = [self._row(text) for text in user.x if len(text) >= self._least]
    rows = [[*self._begin, *row, *self._end] for row in rows if row]
    return (
      self._padded([row[:-1] for row in rows]),
      self._padded([row[1:] for row in rows]),
    )

  def _row(self, text: str) -> list[int]:
    return [self._id_of(word) for word in text.split()[: self.length]]

  def _padded(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
    ids = np.full((len(rows), self.length), PADDING, np.int32)
    for i, row in enumerate(rows):
      ids[i, : min(len(row), self.length)] = row[: self.length]
    return ids


def _numbered(entries: Sequence[str], kind: str, first: int) -> dict[str, int]:
  """Return the ids of a vocabulary's entries, which go on from `first`."""
  ids = {entry: i for i, entry in enumerate(entries, first)}
  if len(ids) < len(entries):
    raise ValueError(f"vocabulary holds a {kind} twice; give each once.")
  return ids


def lines_of(content: bytes, where: str) -> list[str]:
  """Return the words of a vocabulary file, a word a line.

  A first line that is `<OOV>`, or another name for unknown words, is left out:
  they have an id anyway.

  Args:
    content: of the file, UTF-8.
    where: for messages.

  Raises:
    ValueError: it is no UTF-8, or a line is no word.
  """
  try:
    lines = content.decode("utf-8-sig").splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f"{where} is no UTF-8: {error}.") from error
  for number, line in enumerate(lines, 1):
    if line.split() != [line]:
      raise ValueError(f"{where}: line {number} is {line!r}; give one word.")
  return lines[1:] if lines and lines[0] in _UNKNOWN_WORDS else lines


_UNKNOWN_WORDS = ("<OOV>", "<oov>", "<UNK>", "<unk>", "[UNK]")
TEXTS: Mapping[str, type[Text]] = {
  "characters": Characters,
  "tff_characters": TffCharacters,
  "words": Words,
}


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
  return np.concatenate(parts).astype(np.int32)


def users_of(block: Block) -> Iterator[User]:
  """Yield each client's x and y; refuse x that is no text."""
  x, y = (block.examples.get(field) for field in ("x", "y"))
  if x is None or x.dtype != object or x.ndim != 1:
    raise ValueError(
      f"{block.where}: x is no text, one an example; let text be None, or call"
      " the field with the text x."
    )
  if others := sorted(set(block.examples) - {"x", "y"}):
    raise ValueError(
      f"{block.where}: field {others[0]!r} is there beside x and y, all that a"
      " store of text has; name those two in fields."
    )
  ends = np.cumsum(np.asarray(block.sizes, np.int64)).tolist()
  begins = [0, *ends[:-1]]
  for name, begin, end in zip(block.names, begins, ends, strict=True):
    yield User(
      f"{block.where}: client {name!r}",
      x[begin:end].tolist(),
      None if y is None else y[begin:end].tolist(),
    )


def characters_in(blocks: Iterable[Block]) -> list[str]:
  """Return all characters of "x" and of labels that need ids, sorted."""
  found: set[str] = set()
  for block in blocks:
    for user in users_of(block):
      if user.y is not None:
        found.update(*user.x, *(y for y in user.y if isinstance(y, str)))
      elif not block.whole:  # a line break goes before the next block's texts
        found.update("\n", *user.x)
      elif len(text := "\n".join(user.x)) > 1:
        found.update(text)
  return sorted(found)


def words_in(blocks: Iterable[Block], most: int) -> list[str]:
  """Return the most frequent words of "x", ties in alphabetical order.

  Args:
    blocks: blocks of text.
    most: how many words, at most.
  """
  counts: collections.Counter[str] = collections.Counter()
  for block in blocks:
    for user in users_of(block):
      for text in user.x:
        counts.update(text.split())
  ranked = sorted(counts, key=lambda word: (-counts[word], word))
  return ranked[:most]
