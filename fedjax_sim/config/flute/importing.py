"""FLUTE's own files: the flags by which `fedjax-sim data import` reads them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sim.config.flute.rules import LENGTHS
from fedjax_sim.config.flute.translation import Translation

_CLIENTS = "client_config.data_config.train"
_FILES = {  # flag -> the key that names its file
  "train": f"{_CLIENTS}.list_of_train_data",
  "test": "server_config.data_config.test.test_data",
}
_UNKNOWN = "FILE"  # stands for a path that the user knows
_NEWS = "--news"  # written for the model, and so named by the user


class Import(NamedTuple):
  """What makes a store of a task's files.

  Attributes:
    flags: of `fedjax-sim data import`, without `--store`.
    complete: whether all files that they name are there.
  """

  flags: tuple[str, ...]
  complete: bool

  def command(self, store: str) -> str:
    """Return the command that writes a store."""
    return f"fedjax-sim data import {shlex.join(self.flags)} --store={store}"


def importing(translation: Translation, data: str) -> Import:
  """Return what makes a store of the files of a translated file.

  Args:
    translation: of the YAML file, which may name them.
    data: where they lie: a folder, or the file of the clients that train.
  """
  given = {
    r.path: r.value
    for r in translation.rows
    if r.outcome.note and not str(r.value).startswith("<")
  }
  sources = dict(_sources(translation, given, Path(data)))
  fixed = shlex.split(translation.task.imports)
  vocabulary = given.get(f"{_CLIENTS}.vocab_dict")
  paths = {
    "--vocabulary": Path(data) / vocabulary if vocabulary else None,
    "--tokenizer": translation.fields.get("model.folder"),
  }
  for i, flag in enumerate(fixed):
    name, _, value = flag.partition("=")
    if value == _UNKNOWN and paths.get(name) is not None:
      fixed[i] = f"{name}={paths[name]}"
      sources[name] = Path(str(paths[name]))
  flags = [*fixed, *(f"--{k}={sources[k]}" for k in _FILES if k in sources)]
  if "--text" in translation.task.imports:
    lengths = (given.get(f"{_CLIENTS}.{k}") for k in LENGTHS)
    flags += [f"--sequence-length={n}" for n in lengths if n]
  named = any(flag.startswith(_NEWS) for flag in fixed)
  unknown = any(flag.endswith(f"={_UNKNOWN}") for flag in fixed)
  there = all(path.exists() for path in sources.values())
  return Import(tuple(flags), there and not unknown and not named)


def _sources(
  translation: Translation, given: Mapping[str, Any], data: Path
) -> Iterator[tuple[str, Path]]:
  """Yield flag and path of the files: those that the YAML names, or FLUTE's."""
  if data.is_file():
    yield "train", data
    return
  for flag, key in _FILES.items():
    name = given.get(key) or translation.task.files.get(flag)
    if name:
      yield flag, data / name
    elif flag == "train":
      yield flag, data / _UNKNOWN
