"""What LEAF's and FLUTE's files say of users, checked, whoever reads them.

The loader of `data/loaders/leaf.py` and the importers of JSON and HDF5 all end
here. What the scripts of both write besides what they document is taken, too:

- LEAF's Shakespeare, split by samples, counts more in `num_samples` than it
  has, and its older splitter lists users without examples, or leaves them in
  `user_data` alone;
- FLUTE has `num_samples` longer than `users` (classif_cnn), features as texts
  (ecg_cnn), `user_data[u]` as a list (classif_cnn, semisupervision), of lists
  of texts (mlm_bert), `user_data_label[u]` as `{"x": [...]}` (its documents),
  or as the label of a single example (semisupervision).
"""

from __future__ import annotations

import collections
import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.array_files import contents

_SENT140 = 5  # id, date, query, user, text


class User(NamedTuple):
  """What a file says of a user.

  Attributes:
    where: file and user, for messages.
    x: one an example.
    y: one an example, or None.
  """

  where: str
  x: list[Any]
  y: list[Any] | None


class Notes:
  """Deviations from the format that were accepted, for one warning per kind."""

  def __init__(self) -> None:
    self._count: collections.Counter[str] = collections.Counter()
    self._first: dict[str, str] = {}

  def add(self, what: str, where: str) -> None:
    """Count one more user with this deviation."""
    self._count[what] += 1
    self._first.setdefault(what, where)

  def warn(self) -> None:
    """Warn of all that was counted; once per kind, with its first user."""
    for what, count in self._count.items():
      more = f" (and {count - 1:,} more)" if count > 1 else ""
      warnings.warn(f"{self._first[what]}{more}: {what}", stacklevel=2)


_EMPTY = "there are no examples, and who has none is left out."
_COUNT = (
  "num_samples is not the length of x and y, which agree; theirs is taken."
)
_LONGER = (
  "num_samples has more entries than there are users; the first ones are taken."
)


def users_of(
  file: str,
  names: Sequence[Any],
  counts: Sequence[Any],
  data: Iterable[tuple[str, Any]],
  labels: Iterable[tuple[str, Any]],
  notes: Notes,
) -> Iterator[tuple[str, User]]:
  """Yield the users of a file who have examples, in the order of `data`.

  Args:
    file: for messages.
    names: what the file has as `users`.
    counts: as `num_samples`.
    data: the pairs of `user_data`, as they come.
    labels: the pairs of `user_data_label`.
    notes: collects the deviations to warn of.

  Raises:
    ValueError: the file contradicts itself; names the user.
  """
  expected = counts_of(file, names, counts, notes)
  kept = _Labels(labels)
  for name, held in data:
    where = f"{file}: user {name!r}"
    if name not in expected:
      if _is_empty(held):
        notes.add(_EMPTY, where)
        continue
      raise ValueError(
        f"{where} is in user_data, but not in users, or is there twice;"
        " expected every user once in both."
      )
    user = checked_user(where, expected.pop(name), held, kept.of(name), notes)
    if user is not None:
      yield name, user
  for name, held in kept.others():
    if not _is_empty(held):
      raise ValueError(
        f"{file}: user {name!r} is in user_data_label, but not in user_data;"
        " expected the same in both."
      )
  for name, count in expected.items():
    where = f"{file}: user {name!r}"
    if count != 0:
      raise ValueError(
        f"{where}: expected an object in user_data, with x, found nothing."
      )
    notes.add(_EMPTY, where)


def counts_of(
  file: str, names: Sequence[Any], counts: Sequence[Any], notes: Notes
) -> dict[str, Any]:
  """Return user -> the number of examples that the file states.

  Raises:
    ValueError: a user is twice there, or is no name, or counts are missing.
  """
  if len(counts) < len(names):
    raise ValueError(
      f"{file}: num_samples: expected {len(names)}, one a user, found"
      f" {len(counts)}."
    )
  if len(counts) > len(names):
    notes.add(_LONGER, file)
  expected: dict[str, Any] = {}
  for name, count in zip(names, counts, strict=False):
    where = f"{file}: user {name!r}"
    if not isinstance(name, str):
      raise ValueError(f"{where}: expected a name, a string.")
    if name in expected:
      raise ValueError(f"{where} is twice in users; expected every user once.")
    expected[name] = count
  return expected


def checked_user(
  where: str, count: Any, data: Any, labels: Any, notes: Notes
) -> User | None:
  """Return what a file says of a user, if it does not contradict itself.

  Args:
    where: file and user, for messages.
    count: of `num_samples`.
    data: of `user_data`.
    labels: of `user_data_label`, or None.
    notes: collects the deviations to warn of.

  Returns:
    None of a user without examples.

  Raises:
    ValueError: something is missing, of another kind or of another length.
  """
  x: Any
  y: Any
  if isinstance(data, list):
    x, y = data, labels
  elif isinstance(data, dict):
    x, y = data.get("x"), data.get("y", labels)
  else:
    found = "nothing" if data is None else f"a {type(data).__name__}"
    raise ValueError(
      f"{where}: expected an object in user_data, with x, found {found}."
    )
  if not isinstance(x, list):
    raise ValueError(f"{where}: x: expected an array, one entry an example.")
  if isinstance(y, dict):
    y = y.get("x")
  if count == 1 == len(x) and isinstance(y, int | float):
    y = [y]
  if y is not None and not isinstance(y, list):
    raise ValueError(f"{where}: y: expected an array, one entry an example.")
  labelled = None if y is None else len(y)
  if not has_examples(where, count, len(x), labelled, notes):
    return None
  if isinstance(data, list) and y is None and all(map(_is_texts, x)):
    x = [text for texts in x for text in texts]
  return User(where, x, y)


def has_examples(
  where: str, count: Any, length: int, labels: int | None, notes: Notes
) -> bool:
  """Return whether a user has examples; refuse numbers that do not fit.

  Args:
    where: file and user, for messages.
    count: of `num_samples`.
    length: of x.
    labels: the length of y, or None.
    notes: collects the deviations to warn of.

  Raises:
    ValueError: x and y differ in length, or without y, x and `count`.
  """
  if labels is not None and labels != length:
    raise ValueError(
      f"{where}: y has {labels} entries; expected {length}, as x."
    )
  if count != length:
    if labels is None:
      raise ValueError(
        f"{where}: num_samples is {count}; expected {length}, the length of x."
      )
    notes.add(_COUNT, where)
  if not length:
    notes.add(_EMPTY, where)
  return length > 0


def _is_empty(held: Any) -> bool:
  """Return whether a user's data or labels hold no example."""
  parts = list(held.values()) if isinstance(held, dict) else [held]
  return bool(parts) and all(part == [] for part in parts)


def _is_texts(row: Any) -> bool:
  return isinstance(row, list) and all(isinstance(e, str) for e in row)


def texts_of_tweets(rows: Sequence[Any]) -> Sequence[Any]:
  """Return the texts of LEAF's Sent140, whose rows hold more; others as is."""
  tweets = all(_is_texts(row) and len(row) == _SENT140 for row in rows)
  return [row[-1] for row in rows] if tweets else rows


class _Labels:
  """Labels of users, kept until they are asked for."""

  def __init__(self, pairs: Iterable[tuple[str, Any]]):
    self._pairs, self._kept = iter(pairs), dict[str, Any]()

  def of(self, name: str) -> Any:
    """Return the user's labels, or None."""
    if name not in self._kept:
      for other, labels in self._pairs:
        self._kept[other] = labels
        if other == name:
          break
    return self._kept.pop(name, None)

  def others(self) -> Iterator[tuple[str, Any]]:
    """Yield the users whose labels nobody asked for, with those labels."""
    yield from self._kept.items()
    yield from self._pairs


def numbers(where: str, field: str, values: Any) -> np.ndarray:
  """Return a user's values as an array.

  Features that are texts, several an example, are numbers if all are.

  Args:
    where: for messages.
    field: for messages.
    values: one an example.

  Raises:
    ValueError: they are no numbers, or of several shapes.
  """
  try:
    array = np.asarray(values)
  except (ValueError, OverflowError) as error:
    raise ValueError(
      f"{where}: {field}: expected entries of one shape,"
      f" {_uneven(values) or str(error).rstrip('.')}."
    ) from error
  if array.ndim > 1 and array.dtype.kind == "U":
    with contextlib.suppress(ValueError):  # it is told of below
      return array.astype(np.float64)
  if array.dtype.kind not in "biuf":
    raise ValueError(
      f"{where}: {field}: expected numbers, or for x text, found"
      f" {array.dtype}{_first_odd(values)}."
    )
  return array


def _first_odd(values: Any) -> str:
  """Return the place of the first entry that is no number, in words."""
  for i, value in enumerate(values):
    if np.asarray(value).dtype.kind not in "biuf":
      return f" as of entry {i}, {value!r:.60}"
  return ""


def _uneven(values: Any) -> str:
  """Return the first entry with another shape, in words; "" if none has."""
  first = None
  for i, value in enumerate(values):
    try:
      shape = np.shape(value)
    except ValueError:
      return f"and within entry {i} lists have several lengths"
    first = shape if first is None else first
    if shape != first:
      return f"and entry {i} has {shape}, those before {first}"
  return ""


def without_twins(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
  """Return a JSON object's pairs as a mapping, for `object_pairs_hook`.

  Raises:
    ValueError: a name is there twice.
  """
  held = dict(pairs)
  if len(held) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"an object has {twice!r} twice")
  return held


def read_users(place: Path) -> dict[str, User]:
  """Read the users who have examples, by name, in the order of the files.

  Args:
    place: a file, plain or gzipped, or a folder of `.json` and `.json.gz`.

  Raises:
    ValueError: no such files, or one is damaged or contradicts itself; names
      file, user and what was expected.
  """
  files = [place]
  if place.is_dir():
    files = sorted([*place.glob("*.json"), *place.glob("*.json.gz")])
    if not files:
      raise ValueError(
        f"{place} holds no .json or .json.gz; let data.path name the file or"
        " its folder."
      )
  users: dict[str, User] = {}
  notes = Notes()
  for file in files:
    for name, user in _read(file, notes).items():
      if name in users:
        raise ValueError(
          f"{user.where} is there already, as {users[name].where}; expected"
          " every user once."
        )
      users[name] = user._replace(x=list(texts_of_tweets(user.x)))
  notes.warn()
  return users


def _read(file: Path, notes: Notes) -> dict[str, User]:
  try:
    held = json.loads(contents(file), object_pairs_hook=without_twins)
  except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError
    raise ValueError(
      f"{file} cannot be read as JSON: {str(error).rstrip('.')}. Give a LEAF"
      " file, plain or gzipped."
    ) from error
  kinds = {"users": list, "num_samples": list, "user_data": dict}
  for field, kind in kinds.items():
    if not isinstance(held, dict) or not isinstance(held.get(field), kind):
      raise ValueError(f"{file}: {field}: expected a JSON {_JSON[kind]}.")
  labels = held.get("user_data_label", {})
  if not isinstance(labels, dict):
    raise ValueError(f"{file}: user_data_label: expected a JSON object.")
  users = dict(
    users_of(
      str(file),
      held["users"],
      held["num_samples"],
      held["user_data"].items(),
      labels.items(),
      notes,
    )
  )
  return {name: users[name] for name in held["users"] if name in users}


_JSON = {list: "array", dict: "object"}


def has_labels(users: Mapping[str, User]) -> bool:
  """Return whether users have labels; refuse it if only some have."""
  without = [user.where for user in users.values() if user.y is None]
  if without and len(without) < len(users):
    raise ValueError(f"{without[0]}: y is missing; expected it, as others do.")
  return not without


def shrink(
  clients: Mapping[str, dict[str, np.ndarray]], field: str, whole: Any
) -> None:
  """Convert a field of all clients, in place: to uint8, `whole` or float32.

  Args:
    clients: client -> field -> array; changed.
    field: the field.
    whole: the dtype of whole numbers outside 0..255; fractions get float32.
  """
  arrays = [client[field] for client in clients.values() if client[field].size]
  is_whole = all((a == np.rint(a)).all() for a in arrays if a.dtype.kind == "f")
  low = min((a.min() for a in arrays), default=0)
  high = max((a.max() for a in arrays), default=0)
  dtype: Any = np.float32
  if is_whole:
    dtype = np.uint8 if low >= 0 and high <= 255 else whole
  for name, client in clients.items():
    validate.representable(
      f"field {field!r} of user {name!r}", client[field], dtype
    )
    client[field] = client[field].astype(dtype)
