"""Text as ids of a tokenizer's tokens, at import.

A tokenizer is a file of the library `tokenizers`, the `tokenizer.json` of a
Hugging Face model. What it puts around a text, such as tokens for its beginning
and end, stays there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.errors import one_line
from fedjax_sim.core.optional import library
from fedjax_sim.data.importers.blocks import Block
from fedjax_sim.data.importers.text import Ids, Text, users_of
from fedjax_sim.data.leaf_format import User

KINDS = ("tokens", "token_texts")  # a client's texts are joined, or are not
FILE = "tokenizer.json"
_PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")


class Tokens(Text):
  """Ids of tokens, and at every position the next one.

  Without labels a client's texts are joined and cut into sequences, or each is
  an example, from its beginning on. `y` is padding where no
  token follows.

  Args:
    tokenizer: the file, or its folder.
    length: ids of an example; None: 128.
    joined: whether a client's texts without labels are joined.
    padding_token: what fills up a sequence; None: the tokenizer's own.

  Raises:
    TypeError, ValueError: the file is no tokenizer, it has no token for
      padding, or the length is out of range.
    FileNotFoundError: there is no such file.
    ModuleNotFoundError: tokenizers is not installed.
  """

  usual_length = 128

  def __init__(
    self,
    tokenizer: str | os.PathLike[str],
    length: int | None = None,
    *,
    joined: bool = True,
    padding_token: str | None = None,
  ):
    path = Path(tokenizer)
    self._tokenizer = _read(path / FILE if path.is_dir() else path)
    ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
    names = {i: token for token, i in ids.items()}
    self.num_classes = max(names, default=0) + 1
    super().__init__(
      [names.get(i, "") for i in range(self.num_classes)], length
    )
    self.padding = _padding(path, self._tokenizer, ids, padding_token)
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self.joined = joined

  def blocks(self, given: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks with ids instead of text; see `Text.blocks`.

    The end of a client's texts that is shorter than a sequence is kept for its
    next block.
    """
    ends: dict[str, list[int]] = {}
    where = ""
    for block in given:
      if "y" in block.examples or not self.joined:
        yield from super().blocks([block])
        continue
      where, made = block.where, {}
      for name, user in zip(block.names, users_of(block), strict=True):
        ids = ends.pop(name, [])
        for row in self._encoded(user):
          ids += row
        if block.whole:
          made[name] = self._cut(ids, len(ids))
          continue
        # What follows the last token comes with a later block, perhaps.
        whole = max(len(ids) - 1, 0) // self.length * self.length
        made[name] = self._cut(ids[: whole + 1], whole)
        ends[name] = ids[whole:]
      yield self._of(block, made)
    if ends:
      none = Block(where, [], [], {})
      rest = {name: self._cut(ids, len(ids)) for name, ids in ends.items()}
      yield self._of(none, rest)

  def _of(self, block: Block, made: dict[str, tuple[Any, Any]]) -> Block:
    """Return the block with each client's x and y instead of text."""
    made = {name: pair for name, pair in made.items() if len(pair[0])}
    none = np.zeros((0, self.length), np.int32)
    return block._replace(
      rows=None,
      names=list(made),
      sizes=[len(x) for x, _ in made.values()],
      examples={
        field: np.concatenate([none, *(pair[i] for pair in made.values())])
        for i, field in enumerate(("x", "y"))
      },
    )

  def _cut(self, ids: Sequence[int], count: int) -> tuple[Any, Any]:
    """Return the first `count` ids as sequences, and the id after each.

    Both have shape=(sequences, length).
    """
    size = (-(-count // self.length) * self.length,)
    x, y = (np.full(size, self.padding, np.int32) for _ in range(2))
    x[:count] = ids[:count]
    y[: len(ids) - 1] = ids[1:]
    return x.reshape(-1, self.length), y.reshape(-1, self.length)

  def _encoded(self, user: User) -> list[list[int]]:
    return [found.ids for found in self._tokenizer.encode_batch(user.x)]

  def _ids_of(self, user: User) -> Ids:
    rows = self._encoded(user)
    if user.y is not None:
      if any(isinstance(label, str) for label in user.y):
        raise ValueError(
          f"{user.where}: y holds text; give labels that are numbers, or a map"
          " that makes them."
        )
      return self._padded(rows), None
    rows = [row for row in rows if row]
    return self._padded(rows), self._padded([row[1:] for row in rows])

  def _padded(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
    ids = np.full((len(rows), self.length), self.padding, np.int32)
    for i, row in enumerate(rows):
      ids[i, : min(len(row), self.length)] = row[: self.length]
    return ids


def _read(path: Path) -> Any:
  """Return the tokenizer of a file.

  Raises:
    FileNotFoundError: it is missing.
    ValueError: it is none.
  """
  found = library("tokenizers", "text", "A tokenizer")
  if not path.is_file():
    raise FileNotFoundError(
      f"tokenizer={str(path)!r}: there is no such file; give the tokenizer.json"
      " of a model."
    )
  try:
    return found.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises no other type
    raise ValueError(
      f"tokenizer={str(path)!r} is no tokenizer of the library tokenizers"
      f" ({one_line(error)}); give the tokenizer.json of a model."
    ) from error


def _padding(
  path: Path, tokenizer: Any, ids: dict[str, int], token: str | None
) -> int:
  """Return the id that fills up sequences.

  Raises:
    ValueError: there is none.
  """
  if token is not None:
    if token not in ids:
      raise ValueError(
        f"padding_token={token!r} is no token of {path}; give one, such as"
        f" {min(ids, key=ids.__getitem__)!r}."
      )
    return ids[token]
  if tokenizer.padding is not None:
    return int(tokenizer.padding["pad_id"])
  for name in _PADDING:
    if name in ids:
      return ids[name]
  raise ValueError(
    f"tokenizer={str(path)!r} has no token for padding; name one of its tokens"
    " by padding_token, such as '<|endoftext|>'."
  )
