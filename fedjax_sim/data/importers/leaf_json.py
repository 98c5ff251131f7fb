"""LEAF's and FLUTE's JSON, a user at a time.

The layout is that of `fedjax_sim.data.loaders.leaf`, whose loader reads whole
files; `data/leaf_format.py` checks what both read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.optional import library
from fedjax_sim.data.importers.blocks import (
  Block,
  column,
  files_of,
  opened,
  reading,
  source,
)
from fedjax_sim.data.leaf_format import Notes, texts_of_tweets, users_of


@source
def leaf_json(
  path: str | os.PathLike[str], *, raw: bool = False
) -> Iterator[Block]:
  """Read a LEAF or FLUTE file, or a folder of them, a user at a time.

  The memory that this takes is that of the users' names and of one user; and
  of the labels, where `user_data_label` has another order than `user_data`.
  Labels that are all whole numbers are integers, however they are written.

  Args:
    path: `.json`, `.json.gz`, or their folder.
    raw: whether rows that are neither numbers of one shape nor texts stay as
      they are, of dtype object, shape=(examples,), for a map to convert. Else
      they are refused; only of Sent140's rows, which are id, date, query, user
      and text, x is the text.

  Raises:
    FileNotFoundError: there is no such file.
    ModuleNotFoundError: ijson is not installed.
    ValueError: a file is damaged or contradicts itself; names file and user.
  """
  ijson = library("ijson", "json")
  notes = Notes()
  for file in files_of(path, ".json", ".json.gz"):
    with reading(file, "JSON"):
      yield from _users(ijson, file, raw, notes)
  notes.warn()


def _users(ijson: Any, file: Path, raw: bool, notes: Notes) -> Iterator[Block]:
  names, counts = (_items(ijson, file, k) for k in ("users", "num_samples"))
  with opened(file) as one, opened(file) as other:
    data = ijson.kvitems(one, "user_data", use_float=True)
    labels = ijson.kvitems(other, "user_data_label", use_float=True)
    users = users_of(str(file), names, counts, data, labels, notes)
    for name, user in users:
      x = user.x if raw else texts_of_tweets(user.x)
      examples = {"x": column(user.where, "x", x, raw)}
      if user.y is not None:
        examples["y"] = _whole(column(user.where, "y", user.y, raw))
      yield Block(str(file), [name], [len(x)], examples, whole=True)


def _items(ijson: Any, file: Path, field: str) -> list[Any]:
  with opened(file) as stream:
    found = list(ijson.items(stream, f"{field}.item", use_float=True))
  if not found:
    raise ValueError(
      f"{file}: {field}: expected a JSON array, one entry a user."
    )
  return found


def _whole(labels: np.ndarray) -> np.ndarray:
  """Return labels as integers if all are whole; JSON has 0 and 0.0 alike."""
  if labels.dtype.kind != "f" or (labels != np.rint(labels)).any():
    return labels
  return labels.astype(np.int64) if (np.abs(labels) < 2**53).all() else labels
