"""Federated data in LEAF's and FLUTE's JSON: examples by user.

Caldas et al. (2018, "LEAF: a benchmark for federated settings", arXiv
1812.01097). A file holds `users`, `num_samples` and `user_data`, with `x` and
perhaps `y` of each user; FLUTE has the labels in `user_data_label`. What else
there may be is told in `data/leaf_format.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.array_files import contents
from fedjax_sim.data.federated import (
  FederatedData,
  FederatedDataset,
  prepared,
)
from fedjax_sim.data.leaf_format import (
  Notes,
  User,
  numbers,
  texts_of_tweets,
  users_of,
  without_twins,
)
from fedjax_sim.data.location import locate
from fedjax_sim.data.splits import Clients, make_dataset

PADDING = 0  # the id of no character; characters have 1, 2 and so on
INPUTS = ("numbers", "ids")  # what whole numbers of x may be


def prepare_numbers(examples: Mapping[str, Any]) -> dict[str, Any]:
  """Inputs as float32, whole labels as int32."""
  return prepared(examples, examples["x"].astype(np.float32))


def prepare_ids(examples: Mapping[str, Any]) -> dict[str, Any]:
  """Ids, of characters or others, as int32, whole labels as int32."""
  return prepared(examples, examples["x"].astype(np.int32))


def load_leaf_json(
  *,
  path: str | os.PathLike[str] | None = None,
  num_classes: int | None = None,
  inputs: str = "numbers",
  sequence_length: int | None = None,
  vocabulary: str | None = None,
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Users of a LEAF or FLUTE file, or of a folder of such files.

  Numbers are stored as uint8 where all are whole and from 0 to 255, else as
  float32; whole labels and ids beyond that as int32. Text becomes the ids of
  its characters. With labels, an example is the first `sequence_length`
  characters of a text, padded at the end; a label is a number or a character.
  Without labels, a user's texts are joined by line breaks and cut as
  `shakespeare` cuts a role's; who has fewer than two characters has no
  examples.

  Args:
    path: the file, `.json` or `.json.gz`, or the folder; see `locate`.
    num_classes: None: the largest whole label + 1, or 0 if labels are no whole
      numbers; 0: labels are no classes. For labels that are characters there is
      no choice.
    inputs: of x that is no text: "numbers" reach the model as float32, "ids"
      as int32.
    sequence_length: characters of an example, of text; None: 80.
    vocabulary: all characters, of text; None: those that there are, sorted.
    heldout_fraction: see `make_dataset`.
    unseen_clients: see `make_dataset`.
    min_examples: users with fewer are left out.
    seed: of the splits.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: it is damaged or contradicts itself, or an option is
      refused.
  """
  length = validate.whole(
    "data.sequence_length",
    80 if sequence_length is None else sequence_length,
  )
  inputs = validate.known("data.inputs", inputs, INPUTS)
  place = locate(path)
  users = read_users(place)
  is_text = _text_in(users)
  if is_text and inputs != INPUTS[0]:
    raise ValueError(
      f"data.inputs={inputs!r} is for numbers, but {place} holds text, which"
      " becomes ids in any case; unset it."
    )
  if is_text and all(user.y is None for user in users.values()):
    texts = {name: "\n".join(user.x) for name, user in users.items()}
    texts = {name: text for name, text in texts.items() if len(text) >= 2}
    where = {name: user.where for name, user in users.items()}
    ids, vocabulary = encode(texts, vocabulary, where)
    clients = {name: next_characters(ids[name], length) for name in ids}
    num_classes = _fixed(num_classes, len(vocabulary) + 1)
  elif is_text:
    clients, letters = labelled_text(users, length, vocabulary)
    if letters:
      num_classes = _fixed(num_classes, letters + 1)
  else:
    of_text = {"vocabulary": vocabulary, "sequence_length": sequence_length}
    for option, value in of_text.items():
      if value is not None:
        raise ValueError(
          f"data.{option} is for text, but {place} holds numbers; unset it."
        )
    clients = {
      name: {"x": numbers(u.where, "x", u.x)} for name, u in users.items()
    }
    _check_inputs(users, clients, inputs)
    _shrink(clients, "x", np.int32 if inputs == "ids" else np.float32)
    if _labels_in(users):
      for name, user in users.items():
        clients[name]["y"] = numbers(user.where, "y", user.y)
      _shrink(clients, "y", np.int32)
  if num_classes is None:
    num_classes = _count_classes(clients)
  return make_dataset(
    place.name.partition(".")[0],
    FederatedData.from_clients(clients, drop_empty=True),
    num_classes=num_classes,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=prepare_ids if is_text or inputs == "ids" else prepare_numbers,
  )


# --- files --------------------------------------------------------------------


def read_users(place: Path) -> dict[str, User]:
  """Users who have examples, in the order of the files, by name.

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


# --- text ---------------------------------------------------------------------


def encode(
  texts: Mapping[str, str],
  vocabulary: str | None,
  where: Mapping[str, str],
) -> tuple[dict[str, np.ndarray], str]:
  """Ids of characters: 1 for the first of the vocabulary, and so on.

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
  """A text as sequences that do not overlap, each with what follows.

  Args:
    ids: shape=(characters,), two or more.
    length: of a sequence; the last is padded with 0 at its end.

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
  """Examples of each user, and the vocabulary's size if labels are of it."""
  _labels_in(users)  # refuses users without, as there are some with
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
    _shrink(clients, "y", np.int32)
  return clients, len(vocabulary) if letters else 0


# --- what there is ------------------------------------------------------------


def _text_in(users: Mapping[str, User]) -> bool:
  """Whether all inputs are text, not numbers; refuses both."""
  kinds: dict[bool, str] = {}
  for user in users.values():
    for x in user.x:
      kinds.setdefault(isinstance(x, str), user.where)
  if len(kinds) == 2:
    raise ValueError(
      f"{kinds[False]}: x holds what is no text, {kinds[True]} text; expected"
      " one kind."
    )
  return True in kinds


def _labels_in(users: Mapping[str, User]) -> bool:
  """Whether there are labels; refuses users without where others have some."""
  without = [user.where for user in users.values() if user.y is None]
  if without and len(without) < len(users):
    raise ValueError(f"{without[0]}: y is missing; expected it, as others do.")
  return not without


def _fixed(given: int | None, classes: int) -> int:
  if given not in (None, classes):
    raise ValueError(
      f"data.num_classes={given}, but labels are {classes - 1} characters and"
      f" padding; unset it, or give {classes}."
    )
  return classes


def _check_inputs(
  users: Mapping[str, User],
  clients: Mapping[str, Mapping[str, np.ndarray]],
  inputs: str,
) -> None:
  """Refuses what are no ids, or whole numbers that float32 would change."""
  arrays = {name: client["x"] for name, client in clients.items()}
  if inputs == "ids":
    most = np.iinfo(np.int32).max
    wrong = lambda x: (x != np.rint(x)) | (x < 0) | (x > most)
    why = f"expected ids, whole numbers from 0 to {most}"
  elif all((x == np.rint(x)).all() for x in arrays.values()):
    wrong = _rounded
    why = (
      "float32 would round it. Scale x, or let data.inputs be 'ids' if x holds"
      " ids"
    )
  else:  # real numbers are rounded
    return
  for name, x in arrays.items():
    if (found := x[wrong(x)]).size:
      raise ValueError(f"{users[name].where}: x holds {found[0]}; {why}.")


def _rounded(x: np.ndarray) -> np.ndarray:
  """Which whole numbers float32 does not hold."""
  with np.errstate(over="ignore", invalid="ignore"):
    single = x.astype(np.float32)
    if x.dtype.kind == "f":
      return np.asarray(single != x)
    return np.asarray((single >= 2.0**63) | (single.astype(np.int64) != x))


def _shrink(
  clients: Mapping[str, dict[str, np.ndarray]], field: str, whole: Any
) -> None:
  """Makes a field of all clients uint8, else `whole`, else float32."""
  arrays = [client[field] for client in clients.values() if client[field].size]
  is_whole = all((a == np.rint(a)).all() for a in arrays if a.dtype.kind == "f")
  low = min((a.min() for a in arrays), default=0)
  high = max((a.max() for a in arrays), default=0)
  dtype: Any = np.float32
  if is_whole:
    dtype = np.uint8 if low >= 0 and high <= 255 else whole
  for name, client in clients.items():
    validate.fits(f"field {field!r} of user {name!r}", client[field], dtype)
    client[field] = client[field].astype(dtype)


def _count_classes(clients: Mapping[str, Mapping[str, np.ndarray]]) -> int:
  labels = [c["y"] for c in clients.values() if "y" in c and c["y"].size]
  if not labels or any(y.dtype.kind not in "iu" for y in labels):
    return 0
  return 1 + max(0, *(int(y.max()) for y in labels))
