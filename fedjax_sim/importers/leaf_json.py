"""LEAF's and FLUTE's JSON, a user at a time.

The layout is that of `fedjax_sim.data.leaf`, whose loader reads whole files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedjax_sim.data.leaf import checked_user
from fedjax_sim.importers.blocks import (
  Block,
  column,
  files_of,
  library,
  opened,
  reading,
  source,
)


@source
def leaf_json(path: str | os.PathLike[str]) -> Iterator[Block]:
  """Users of a LEAF or FLUTE file, plain or gzipped, or of a folder of them.

  The memory that this takes is that of the users' names and of one user; and
  of the labels, where `user_data_label` has another order than `user_data`.

  Raises:
    FileNotFoundError: there is no such file.
    ModuleNotFoundError: ijson is not installed.
    ValueError: a file is damaged or contradicts itself; names file and user.
  """
  ijson = library("ijson", "json")
  for file in files_of(path, ".json", ".json.gz"):
    with reading(file, "JSON"):
      yield from _users(ijson, file)


def _users(ijson: Any, file: Path) -> Iterator[Block]:
  counts = _counts(ijson, file)
  with opened(file) as one, opened(file) as other:
    data = ijson.kvitems(one, "user_data", use_float=True)
    labels = _Labels(ijson.kvitems(other, "user_data_label", use_float=True))
    for name, held in data:
      where = f"{file}: user {name!r}"
      if name not in counts:
        raise ValueError(
          f"{where} is in user_data, but not in users, or is there twice;"
          " expected every user once in both."
        )
      label = labels.of(name)
      user = checked_user(where, counts.pop(name), held, label)
      examples = {"x": column(where, "x", user.x)}
      if user.y is not None:
        examples["y"] = column(where, "y", user.y)
      yield Block(str(file), [name], [len(user.x)], examples, whole=True)
    for name in labels.others():
      raise ValueError(
        f"{file}: user {name!r} is in user_data_label, but not in user_data;"
        " expected the same in both."
      )
  for name in counts:
    raise ValueError(
      f"{file}: user {name!r}: expected an object in user_data, with x, found"
      " nothing."
    )


def _counts(ijson: Any, file: Path) -> dict[str, Any]:
  """User -> what the file says is the number of examples."""

  def items(field: str) -> list[Any]:
    with opened(file) as stream:
      found = list(ijson.items(stream, f"{field}.item", use_float=True))
    if not found:
      raise ValueError(
        f"{file}: {field}: expected a JSON array, one entry a user."
      )
    return found

  names, sizes = items("users"), items("num_samples")
  if len(names) != len(sizes):
    raise ValueError(
      f"{file}: num_samples: expected {len(names)}, one a user, found"
      f" {len(sizes)}."
    )
  counts: dict[str, Any] = {}
  for name, size in zip(names, sizes, strict=True):
    if not isinstance(name, str):
      raise ValueError(f"{file}: user {name!r}: expected a name, a string.")
    if name in counts:
      raise ValueError(
        f"{file}: user {name!r} is twice in users; expected every user once."
      )
    counts[name] = size
  return counts


class _Labels:
  """Labels of users, kept until they are asked for."""

  def __init__(self, pairs: Iterator[tuple[str, Any]]):
    self._pairs, self._kept = pairs, dict[str, Any]()

  def of(self, name: str) -> Any:
    """The user's labels, or None."""
    if name not in self._kept:
      for other, labels in self._pairs:
        self._kept[other] = labels
        if other == name:
          break
    return self._kept.pop(name, None)

  def others(self) -> Iterator[str]:
    """Users whose labels nobody asked for."""
    yield from self._kept
    yield from (name for name, _ in self._pairs)
