"""The files of a checkpoint: their names, and their SHA-256 sums.

The folder has the number of the round as its name; it is there when the
checkpoint is complete:

- `record/`: facts, and dtype, shape and SHA-256 of each array;
- `state/`: the arrays that every process has whole;
- `pieces_0.bin`: pieces of the other arrays, those of process 0;
- `record_0.json`: where each of them lies, and its SHA-256;
- `sha256.json`: the SHA-256 of all other files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

UNFINISHED = ".unfinished"  # ends the name of a folder that is being written
DAMAGED = ".damaged"  # ends the name of one that was set aside
RECORD = "record"  # begins the names of what is known of the leaves
SUMS = "sha256.json"  # file of a checkpoint -> its SHA-256
_PIECES = re.compile(r"pieces_(\d+)\.bin")


def rounds_in(folder: Path) -> list[int]:
  """Return the rounds of which there is a checkpoint, in order.

  A folder without a file is none: some tools leave it of one that is removed.
  """
  found = [path for path in folder.glob("*") if path.name.isdecimal()]
  return sorted(int(path.name) for path in found if _has_file(path))


def _has_file(folder: Path) -> bool:
  return any(path.is_file() for path in folder.rglob("*"))


def key(leaf: int) -> str:
  """Return the name of a whole array in a checkpoint, by its leaf's number."""
  return f"leaf{leaf:05d}"


def pieces_file(checkpoint: Path, process: int) -> Path:
  """Return the file of a process's pieces."""
  return checkpoint / f"pieces_{process}.bin"


def pieces_record(checkpoint: Path, process: int) -> Path:
  """Return the file that says where a process's pieces lie."""
  return checkpoint / f"{RECORD}_{process}.json"


def sums_of(checkpoint: Path) -> dict[str, str]:
  """Return the SHA-256 of each file of a checkpoint but the one of sums.

  Pieces are not read: the process that wrote them says their sum.
  """
  found = {}
  for name in _names(checkpoint):
    pieces = _PIECES.fullmatch(name)
    if pieces is None:
      found[name] = sum_of(checkpoint / name)
    else:
      record = pieces_record(checkpoint, int(pieces[1]))
      found[name] = json.loads(record.read_bytes())["sha256"]
  return found


def check_files(
  folder: Path, part: str = "", share: tuple[int, int] = (0, 1)
) -> None:
  """Raise ValueError or OSError for a file that is not as it was written.

  Args:
    folder: of the checkpoint.
    part: how the names of the files begin; "" for all.
    share: (i, n) reads every n-th file from the i-th on, and only looks
      whether the others are there.
  """
  wanted = json.loads((folder / SUMS).read_bytes())
  wanted = {k: v for k, v in wanted.items() if k.startswith(part)}
  found = {name for name in _names(folder) if name.startswith(part)}
  index, count = share
  for number, name in enumerate(sorted(wanted.keys() | found)):
    if name not in found:
      raise ValueError(f"{name} is missing")
    mine = number % count == index
    if name not in wanted or (mine and sum_of(folder / name) != wanted[name]):
      raise ValueError(f"the SHA-256 of {name} differs")


def _names(folder: Path) -> list[str]:
  """Return the files that the folder's sums are about, in order."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  names = [path.relative_to(folder).as_posix() for path in files]
  return [name for name in names if name != SUMS]


def sum_of(path: Path) -> str:
  """Return the SHA-256 of a file's bytes."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
  """Return the first line of an error, 200 characters at most."""
  if isinstance(error, FileNotFoundError) and error.filename:
    return f"{Path(os.fsdecode(error.filename)).name} is gone"
  text = str(getattr(error, "strerror", None) or error).strip()
  text = text or type(error).__name__
  line = text.splitlines()[0]
  # TensorStore goes on with its specification, and where in its code.
  line = re.split(r" \[(?:tensorstore_spec|source locations)=", line)[0]
  if len(line) <= 200:
    return line
  return line[:197].rsplit(" ", 1)[0] + "..."
