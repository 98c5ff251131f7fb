"""Federated data in LEAF's and FLUTE's JSON: examples by user.

Caldas et al. (2018, "LEAF: a benchmark for federated settings", arXiv
1812.01097). A file holds `users`, `num_samples` and `user_data`, with `x` and
perhaps `y` of each user; FLUTE has the labels in `user_data_label`. What else
there may be is listed in `data/leaf_format.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.batch_steps import prepare_ids, prepare_numbers
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.leaf_format import (
  User,
  has_labels,
  numbers,
  read_users,
  shrink,
)
from fedjax_sim.data.location import locate
from fedjax_sim.data.splits import Clients, make_dataset
from fedjax_sim.data.text import encode, labelled_text, next_characters

INPUTS = ("numbers", "ids")  # what whole numbers of x may be


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
  """Load the users of a LEAF or FLUTE file, or of a folder of such files.

  Numbers are stored as uint8 where all are whole and from 0 to 255, else as
  float32; whole labels and ids beyond that as int32. Text becomes the ids of
  its characters. With labels, an example is the first `sequence_length`
  characters of a text, padded at the end; a label is a number or a character.
  Without labels, a user's texts are joined by line breaks and cut as
  `shakespeare` cuts a role's; who has fewer than two characters has no
  examples.

  Args:
    path: the file, `.json` or `.json.gz`, or the folder; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    num_classes: None: the largest whole label + 1, or 0 if labels are no whole
      numbers; 0: labels are no classes. For labels that are characters there is
      no choice.
    inputs: of x that is no text: "numbers" reach the model as float32, "ids"
      as int32.
    sequence_length: characters of an example, of text; None: 80.
    vocabulary: all characters, of text; None: those that there are, sorted.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: users with fewer are left out.
    seed: of the splits.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: it is damaged or contradicts itself, or an option is
      refused.
  """
  length = validate.integer(
    "data.sequence_length",
    80 if sequence_length is None else sequence_length,
  )
  inputs = validate.one_of("data.inputs", inputs, INPUTS)
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
    shrink(clients, "x", np.int32 if inputs == "ids" else np.float32)
    if has_labels(users):
      for name, user in users.items():
        clients[name]["y"] = numbers(user.where, "y", user.y)
      shrink(clients, "y", np.int32)
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


def _text_in(users: Mapping[str, User]) -> bool:
  """Return whether all inputs are text; refuse text mixed with numbers."""
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
  """Refuse what are no ids, or whole numbers that float32 would change."""
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
  """Return a mask of the whole numbers that float32 does not hold."""
  with np.errstate(over="ignore", invalid="ignore"):
    single = x.astype(np.float32)
    if x.dtype.kind == "f":
      return np.asarray(single != x)
    return np.asarray((single >= 2.0**63) | (single.astype(np.int64) != x))


def _count_classes(clients: Mapping[str, Mapping[str, np.ndarray]]) -> int:
  labels = [c["y"] for c in clients.values() if "y" in c and c["y"].size]
  if not labels or any(y.dtype.kind not in "iu" for y in labels):
    return 0
  return 1 + max(0, *(int(y.max()) for y in labels))
