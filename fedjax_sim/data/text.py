"""Text as ids of characters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.leaf_format import User, has_labels, numbers, shrink

PADDING = 0  # the id of no character; characters have 1, 2 and so on
UNKNOWN = 1  # the id of all words that the vocabulary lacks


def encode(
  texts: Mapping[str, str],
  vocabulary: str | None,
  where: Mapping[str, str],
) -> tuple[dict[str, np.ndarray], str]:
  """Return ids of characters: 1 for the first of the vocabulary, and so on.

  Args:
    texts: of each user.
    vocabulary: all characters; None: those that there are, sorted.
    where: what messages call each user.

  Returns:
    ids, shape=(characters,), of each user, and the vocabulary.

  Raises:
    TypeError, ValueError: a character is twice in the vocabulary, or not at
      all; names it and its user.
  """
  if vocabulary is None:
    vocabulary = "".join(sorted(set().union(*texts.values())))
  validate.instance("data.vocabulary", vocabulary, str, "'abc '")
  if twice := sorted(c for c in set(vocabulary) if vocabulary.count(c) > 1):
    raise ValueError(
      f"data.vocabulary holds {twice[0]!r} twice; give every character once."
    )
  points = _code_points(vocabulary)
  order = np.argsort(points)
  dtype = np.min_scalar_type(len(vocabulary))
  ids = {}
  for name, text in texts.items():
    if missing := sorted(set(text) - set(vocabulary)):
      raise ValueError(
        f"{where[name]} has the character {missing[0]!r}, which data.vocabulary"
        " lacks; add it, or unset data.vocabulary."
      )
    ranks = np.searchsorted(points, _code_points(text), sorter=order)
    ids[name] = (order[ranks] + 1).astype(dtype)
  return ids, vocabulary


def next_characters(ids: np.ndarray, length: int) -> dict[str, np.ndarray]:
  """Cut a text in sequences that do not overlap, with the next characters.

  Args:
    ids: shape=(characters,), two or more.
    length: the length of a sequence; the last is padded with 0 at its end.

  Returns:
    x and y, shape=(n, length), y the character after each of x; where there
    is none, both are 0.
  """
  rows = -(-(len(ids) - 1) // length)
  padded = np.full((2, rows * length), PADDING, ids.dtype)
  padded[0, : len(ids) - 1] = ids[:-1]
  padded[1, : len(ids) - 1] = ids[1:]
  x, y = padded.reshape(2, rows, length)
  return {"x": x, "y": y}


def _code_points(text: str) -> np.ndarray:
  # JSON may hold halves of surrogate pairs.
  return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def labelled_text(
  users: Mapping[str, User], length: int, vocabulary: str | None
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
  """Return the examples of users with labels, and the vocabulary's size.

  Labels are characters of the vocabulary, or numbers; the size is then 0.

  Args:
    users: the users, all with labels.
    length: characters of an example.
    vocabulary: see `encode`.
  """
  has_labels(users)  # refuses users without, as there are some with
  named = {name: (user, user.y or []) for name, user in users.items()}
  letters = any(isinstance(c, str) for _, y in named.values() for c in y)
  texts, where = {}, {}
  for name, (user, y) in named.items():
    for label in y if letters else []:
      if not isinstance(label, str) or len(label) != 1:
        raise ValueError(
          f"{user.where}: y holds {label!r}; expected one character, as other"
          " labels are."
        )
    labels = y if letters else []
    texts[name] = "".join([text[:length] for text in user.x] + labels)
    where[name] = user.where
  ids, vocabulary = encode(texts, vocabulary, where)
  clients = {}
  for name, (user, y) in named.items():
    x = np.full((len(user.x), length), PADDING, ids[name].dtype)
    ends = np.minimum([len(text) for text in user.x], length).astype(int)
    total = int(ends.sum())
    x[np.arange(length) < ends[:, np.newaxis]] = ids[name][:total]
    clients[name] = {
      "x": x,
      "y": ids[name][total:] if letters else numbers(user.where, "y", y),
    }
  if not letters:
    shrink(clients, "y", np.int32)
  return clients, len(vocabulary) if letters else 0
