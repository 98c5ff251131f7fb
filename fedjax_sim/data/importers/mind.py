"""MIND, Microsoft's news data set: impressions of users, and titles.

Wu et al. 2020, "MIND: a large-scale dataset for news recommendation". A folder
has `news.tsv` (news, category, subcategory, title, ...) and `behaviors.tsv`
(impression, user, time, earlier clicks, candidates such as `N1-1 N2-0`), both
without a header.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.importers import blocks
from fedjax_sim.data.importers.blocks import (
  Block,
  grouped,
  opened,
  reading,
  source,
)
from fedjax_sim.data.news import News

_WORD = re.compile(r"\w+(?:['\u2019]\w+)?|[^\w\s]")
_LABELS = {"0": 0, "1": 1}


class Catalogue(NamedTuple):
  """All news of a data set's folders.

  Attributes:
    ids: name -> id, from 1.
    news: the titles, by id.
  """

  ids: Mapping[str, int]
  news: News


def catalogue(
  folders: Iterable[str | os.PathLike[str]], title_length: int = 30
) -> Catalogue:
  """Read the titles of all folders; news that are in several have one id.

  Titles are in lower case, and cut into words and marks of punctuation.

  Args:
    folders: each with `news.tsv`.
    title_length: words of a title; what is beyond is left out.

  Raises:
    FileNotFoundError: a folder has no such file.
    ValueError: a file is damaged; names the line.
  """
  length = validate.integer("title_length", title_length)
  titles: dict[str, list[str]] = {}
  for folder in folders:
    file = _file(folder, "news.tsv")
    for number, parts in _rows(file, 4):
      if not parts[0]:
        raise ValueError(f"{file}: line {number} names no news.")
      titles.setdefault(parts[0], _WORD.findall(parts[3].lower())[:length])
  words: dict[str, int] = {}
  table = np.zeros((len(titles) + 1, length), np.int32)
  for i, title in enumerate(titles.values(), 1):
    row = [words.setdefault(word, len(words) + 1) for word in title]
    table[i, : len(row)] = row
  ids = {name: i for i, name in enumerate(titles, 1)}
  return Catalogue(ids, News(table, tuple(words)))


@source
def mind(
  path: str | os.PathLike[str],
  *,
  news: Catalogue,
  sampled: bool,
  clicked: int = 50,
  candidates: int = 300,
  negatives: int = 4,
  seed: int = 0,
) -> Iterator[Block]:
  """Read the impressions of a folder; users are the clients.

  An example has `x`, ids of news, (clicked + candidates,), first the user's
  last clicks before the impression, padded with 0 before them, then the
  candidates, padded with 0 behind them; and `y`, (candidates,), 1 for a click.

  Args:
    path: the folder of `behaviors.tsv`.
    news: of this folder, and of others.
    sampled: every click is an example of its own, followed by some of the
      impression's other news, drawn at random, all if there are fewer; an
      impression without others has none. Else every impression is an example.
    clicked: earlier clicks of an example, at most.
    candidates: of an example, at most.
    negatives: news that were not clicked, of a sampled example.
    seed: of what is drawn.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, has no labels, news that the catalogue lacks, or
      more candidates; names the line.
  """
  file = _file(path, "behaviors.tsv")
  validate.integer("clicked", clicked)
  validate.integer("negatives", negatives)
  validate.integer("candidates", candidates, ge=negatives + 1)
  layout = _Layout(clicked, candidates, negatives, seed)
  each = 1 + blocks.BLOCK // (5 * (clicked + candidates))
  users: list[str] = []
  examples: list[tuple[np.ndarray, np.ndarray]] = []
  first = 0
  for number, (_, user, _, clicks, shown) in _rows(file, 5):
    where = f"{file}: line {number}"
    if not user:
      raise ValueError(f"{where} names no user.")
    impression = _impression(where, clicks, shown, news.ids)
    made = (
      layout.sampled(impression, number)
      if sampled
      else layout.whole(impression, where)
    )
    users += [user] * len(made)
    examples += made
    if len(examples) >= each:
      yield _block(file, users, examples, first)
      first += len(examples)
      users, examples = [], []
  if examples:
    yield _block(file, users, examples, first)


class _Impression(NamedTuple):
  """Ids of news: earlier clicks, candidates, and which of them are clicks."""

  before: list[int]
  shown: np.ndarray
  hits: np.ndarray


class _Layout(NamedTuple):
  """How impressions become examples; see `mind`."""

  clicked: int
  candidates: int
  negatives: int
  seed: int

  def _example(
    self, before: Sequence[int], shown: np.ndarray, hits: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    x = np.zeros(self.clicked + self.candidates, np.int32)
    y = np.zeros(self.candidates, np.uint8)
    last = list(before)[-self.clicked :]
    x[self.clicked - len(last) : self.clicked] = last
    x[self.clicked : self.clicked + len(shown)] = shown
    y[: len(hits)] = hits
    return x, y

  def whole(
    self, impression: _Impression, where: str
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the impression as an example."""
    count = len(impression.shown)
    if count > self.candidates:
      raise ValueError(
        f"{where} has {count} candidates, and candidates={self.candidates};"
        " give at least as many."
      )
    return [self._example(*impression)]

  def sampled(
    self, impression: _Impression, line: int
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return an example a click; `line` says what is drawn."""
    before, shown, hits = impression
    others = shown[~hits]
    rng = np.random.default_rng((self.seed, line))
    made = []
    for click in shown[hits] if len(others) else ():
      few = rng.permutation(others)[: self.negatives]
      made.append(self._example(before, np.append(click, few), np.array([1])))
    return made


def _impression(
  where: str, clicks: str, shown: str, ids: Mapping[str, int]
) -> _Impression:
  """Read the last two columns of a line of `behaviors.tsv`."""
  named, hits = [], []
  for entry in shown.split():
    name, _, label = entry.rpartition("-")
    if not name or label not in _LABELS:
      raise ValueError(
        f"{where}: the candidate {entry!r} has no label; expected {entry}-0 or"
        f" {entry}-1, which the folder of MIND's test lacks."
      )
    named.append(name)
    hits.append(_LABELS[label])
  if not named:
    raise ValueError(f"{where} has no candidates; leave it out.")
  before = clicks.split()
  for name in (*before, *named):
    if name not in ids:
      raise ValueError(
        f"{where}: news {name!r} is in no news.tsv; get the folder again."
      )
  return _Impression(
    [ids[name] for name in before],
    np.array([ids[name] for name in named], np.int32),
    np.array(hits, bool),
  )


def _rows(file: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
  """Yield number and columns of each line of a table without a header.

  Raises:
    ValueError: a line has fewer columns, or is no UTF-8.
  """
  with reading(file, "MIND's table"), opened(file) as stream:
    for number, line in enumerate(stream, 1):
      if not line.strip():
        continue
      parts = line.decode().rstrip("\r\n").split("\t")
      if len(parts) < columns:
        raise ValueError(
          f"{file}: line {number} has {len(parts)} columns between tabs;"
          f" expected {columns}, as MIND's {file.name} has."
        )
      yield number, parts[:columns]


def _file(folder: str | os.PathLike[str], name: str) -> Path:
  file = Path(folder) / name
  if not file.is_file():
    raise FileNotFoundError(
      f"{folder} holds no {name}; give one of MIND's folders."
    )
  return file


def _block(
  file: Path,
  users: Sequence[str],
  examples: Sequence[tuple[np.ndarray, np.ndarray]],
  first: int,
) -> Block:
  x, y = (np.stack(part) for part in zip(*examples, strict=True))
  return grouped(str(file), users, {"x": x, "y": y}, row=first)
