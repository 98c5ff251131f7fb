"""News for recommendation: the words of titles, and the words' vectors.

A news file is an `.npz` with `titles`, ids of words, shape=(news + 1, words),
int32, and `words`, UTF-8, a word a line. News 0 is none, and word 0 no word.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sim.core.files import write_atomically
from fedjax_sim.data.location import locate


class News(NamedTuple):
  """Titles of news.

  Attributes:
    titles: shape=(news + 1, words), int32; ids of words, padded with 0 at the
      end. Row 0 is of padding.
    words: the word of id 1, of id 2, and so on.
  """

  titles: np.ndarray
  words: tuple[str, ...]


def write_news(path: str | os.PathLike[str], news: News) -> None:
  """Write a news file, atomically.

  Raises:
    OSError: the file cannot be written.
  """
  file = io.BytesIO()
  letters = np.frombuffer("\n".join(news.words).encode(), np.uint8)
  np.savez(file, titles=news.titles, words=letters)
  write_atomically(path, file.getvalue())


def read_news(path: str | os.PathLike[str], field: str = "news") -> News:
  """Return the titles of a news file.

  Args:
    path: the file; see `locate`.
    field: what messages call it.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no news file, or damaged.
  """
  file = locate(path, field)
  try:
    with np.load(file, allow_pickle=False) as held:
      titles, letters = held["titles"], held["words"]
    words = tuple(letters.tobytes().decode().split("\n"))
    good = titles.ndim == 2 and titles.dtype == np.int32 and titles.size
    if not good or titles.min() < 0 or titles.max() > len(words):
      raise ValueError("titles are no ids of its words")
  except Exception as error:  # whatever numpy raises for torn bytes
    raise ValueError(
      f"{field}={str(path)!r} is no news file ({error}); write it by fedjax-sim"
      " data import --format=mind."
    ) from error
  return News(titles, words)


def read_vectors(
  path: str | os.PathLike[str], words: Sequence[str], field: str = "embedding"
) -> np.ndarray:
  """Return a vector a word, shape=(words + 1, dimensions), float32.

  Row 0, of no word, is 0, and so are those of words that a text file lacks.

  Args:
    path: GloVe's text, a word and its numbers a line; or weights, `.npz` or
      `.safetensors`, with one array of this shape. See `locate`.
    words: the word of id 1, and so on.
    field: what messages call the path.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a file is damaged, or of another shape; names the line.

  Warns:
    UserWarning: words without a vector.
  """
  from fedjax_sim.core.weights import FORMATS, read_weights  # with JAX

  file, what = locate(path, field), f"{field}={str(path)!r}"
  if file.suffix not in FORMATS:
    return _of_text(file, words, what)
  arrays = read_weights(file).arrays
  shape = (len(words) + 1,)
  fitting = [x for x in arrays.values() if x.ndim == 2 and x.shape[:1] == shape]
  if len(fitting) != 1 or fitting[0].dtype.kind != "f":
    shapes = {k: x.shape for k, x in arrays.items()}
    raise ValueError(
      f"{what} holds {shapes}; give one array of floats, a row for each of"
      f" {shape[0]:,} ids of words, the first of no word."
    )
  vectors = fitting[0].astype(np.float32)
  _check_finite(what, vectors)
  return vectors


def _of_text(file: Path, words: Sequence[str], what: str) -> np.ndarray:
  """Return the vectors of a GloVe file; see `read_vectors`.

  A first line of two numbers, as word2vec's text has it, is left out. A few of
  GloVe's words have spaces in them, and so no title has them.
  """
  ids = {word: i for i, word in enumerate(words, 1)}
  missing, size = set(ids), 0
  vectors = np.zeros((0, 0), np.float32)
  with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
    for number, line in enumerate(stream, 1):
      if size and line[: line.find(" ")] not in missing:
        continue
      word, *numbers = line.rstrip("\n ").split(" ")
      if number == 1 and len(numbers) == 1:
        continue
      if not size:
        size = max(1, len(numbers))
        vectors = np.zeros((len(words) + 1, size), np.float32)
      if word in missing and len(numbers) <= size:
        vectors[ids[word]] = _vector(f"{what}: line {number}", numbers, size)
        missing.remove(word)
  if len(missing) == len(ids):
    raise ValueError(
      f"{what} has no vector of any of {len(ids):,} words; give GloVe's text,"
      " a word and its numbers a line."
    )
  _check_finite(what, vectors)
  if missing:
    warnings.warn(
      f"{what} lacks {len(missing):,} of {len(ids):,} words, such as"
      f" {min(missing)!r}; their vectors are 0.",
      stacklevel=3,
    )
  return vectors


def _vector(where: str, numbers: Sequence[str], size: int) -> np.ndarray:
  try:
    vector = np.array(numbers, np.float32)
  except ValueError:
    vector = np.zeros(0, np.float32)
  if vector.shape != (size,):
    raise ValueError(
      f"{where}: expected a word and {size} numbers; get the file again."
    )
  return vector


def _check_finite(what: str, vectors: np.ndarray) -> None:
  finite = np.isfinite(vectors).all(axis=1)
  if not finite.all():
    raise ValueError(
      f"{what}: the vector of word {int(np.argmin(finite))} is not finite; get"
      " the file again."
    )
