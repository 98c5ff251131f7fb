"""Text as ids, at import: characters or words, with what follows each.

Without labels a text becomes sequences to predict the next id of, as in McMahan
et al. (2017, arXiv 1602.05629; characters of Shakespeare) and Reddi et al.
(2021, arXiv 2003.00295; words of Stack Overflow).
"""

from __future__ import annotations

import abc
import collections
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fedjax_sim import validate
from fedjax_sim.data.leaf import (
  PADDING,
  User,
  encode,
  labelled_text,
  next_characters,
)
from fedjax_sim.importers.blocks import Block

UNKNOWN, BEGIN, END = 1, 2, 3  # words' ids go on from these


class Text(abc.ABC):
  """How the text "x" of a block becomes ids, of dtype int32.

  Attributes:
    vocabulary: what has ids of its own.
    length: ids of an example; what is shorter is padded with 0.
    num_classes: of ids that are labels, with padding and others.
  """

  vocabulary: tuple[str, ...]
  num_classes: int

  def __init__(self, length: int):
    self.length = validate.whole("sequence_length", length)

  def __call__(self, block: Block) -> Block:
    """The block with ids instead of text.

    Raises:
      ValueError: "x" is no text, or a label is neither a number nor, with
        characters, one of them.
    """
    parts, sizes = [], []
    for user in _users(block):
      ids = self._of_client(user)
      parts.append({k: v.astype(np.int32) for k, v in ids.items()})
      sizes.append(len(ids["x"]))
    fields = parts[0] if parts else {}
    held = {k: np.concatenate([part[k] for part in parts]) for k in fields}
    return block._replace(sizes=sizes, examples=held)

  @abc.abstractmethod
  def _of_client(self, user: User) -> dict[str, np.ndarray]:
    """x, (examples, length), and y, which is as x where there is none."""


class Characters(Text):
  """Ids of characters: 1 for the first of the vocabulary, and so on.

  Without labels a client's texts are joined by line breaks and cut into
  sequences. Else an example is the beginning of a text, and labels are numbers,
  or characters.
  """

  def __init__(self, vocabulary: Sequence[str], length: int = 80):
    super().__init__(length)
    self.vocabulary = tuple(vocabulary)
    self._letters = "".join(vocabulary)
    if len(self._letters) != len(self.vocabulary):
      raise ValueError(
        "vocabulary holds what is no single character; give a list of them."
      )
    self.num_classes = len(vocabulary) + 1

  def _of_client(self, user: User) -> dict[str, np.ndarray]:
    where = {"": user.where}
    if user.y is not None:
      found, _ = labelled_text({"": user}, self.length, self._letters)
      return found[""]
    text = "\n".join(user.x)
    if len(text) < 2:
      empty = np.zeros((0, self.length), np.int32)
      return {"x": empty, "y": empty}
    ids, _ = encode({"": text}, self._letters, where)
    return next_characters(ids[""], self.length)


class Words(Text):
  """Ids of words, between spaces: 4 for the first of the vocabulary, and so on.

  1 is any other word, 2 begins and 3 ends a text. Without labels an example is
  a text, from its beginning on, and y the next word; a text without words is
  left out.
  """

  def __init__(self, vocabulary: Sequence[str], length: int = 20):
    super().__init__(length)
    self.vocabulary = tuple(vocabulary)
    self._ids = {word: i for i, word in enumerate(vocabulary, END + 1)}
    if len(self._ids) < len(self.vocabulary):
      raise ValueError("vocabulary holds a word twice; give each once.")
    self.num_classes = len(vocabulary) + END + 1

  def _of_client(self, user: User) -> dict[str, np.ndarray]:
    rows = [
      [self._ids.get(word, UNKNOWN) for word in text.split()] for text in user.x
    ]
    if user.y is not None:
      if any(isinstance(label, str) for label in user.y):
        raise ValueError(
          f"{user.where}: y holds text; give labels that are numbers, or a map"
          " that makes them."
        )
      return {"x": self._padded(rows), "y": np.array(user.y)}
    rows = [[BEGIN, *row, END] for row in rows if row]
    return {
      "x": self._padded([row[:-1] for row in rows]),
      "y": self._padded([row[1:] for row in rows]),
    }

  def _padded(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
    ids = np.full((len(rows), self.length), PADDING, np.int32)
    for i, row in enumerate(rows):
      ids[i, : min(len(row), self.length)] = row[: self.length]
    return ids


def _users(block: Block) -> Iterator[User]:
  """Each client's x, if that is text, and y."""
  x = block.examples.get("x")
  if x is None or x.dtype != object:
    raise ValueError(
      f"{block.where}: x is no text; let text be None, or call the field with"
      " the text x."
    )
  ends = np.cumsum(np.asarray(block.sizes, np.int64)).tolist()
  begins = [0, *ends[:-1]]
  for name, begin, end in zip(block.names, begins, ends, strict=True):
    y = block.examples.get("y")
    yield User(
      f"{block.where}: client {name!r}",
      x[begin:end].tolist(),
      None if y is None else y[begin:end].tolist(),
    )


def characters_in(blocks: Iterable[Block]) -> list[str]:
  """All characters of "x" that have ids, and of labels that are, sorted."""
  found: set[str] = set()
  for block in blocks:
    for user in _users(block):
      if user.y is not None:
        found.update(*user.x, *(y for y in user.y if isinstance(y, str)))
      elif len(text := "\n".join(user.x)) >= 2:
        found.update(text)
  return sorted(found)


def words_in(blocks: Iterable[Block], most: int) -> list[str]:
  """The most frequent words of "x"; among equals the alphabet decides.

  Args:
    blocks: of text.
    most: how many.
  """
  counts: collections.Counter[str] = collections.Counter()
  for block in blocks:
    for user in _users(block):
      for text in user.x:
        counts.update(text.split())
  ranked = sorted(counts, key=lambda word: (-counts[word], word))
  return ranked[:most]
