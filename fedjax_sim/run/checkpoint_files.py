"""The files of a checkpoint: their names, and their SHA-256 sums.

20/                    of round 20; there when the checkpoint is complete
record/              facts, and dtype, shape and SHA-256 of each array
state/               the arrays that every process has whole
pieces_0/            pieces of the other arrays, of process 0
record/ state/     where they lie, their SHA-256; and the pieces
sha256.json        of the files here
sha256.json          of all other files, and of those sums
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

UNFINISHED = ".unfinished"  # ends the name of a folder that is being written
DAMAGED = ".damaged"  # ends the name of one that was set aside
RECORD = "record"  # folder of a checkpoint: what is known of its leaves
SUMS = "sha256.json"  # file of a checkpoint -> its SHA-256
_PIECES = "pieces_{}"
_IN_PIECES = re.compile(r"(pieces_\d+)/(.*)")


def rounds_in(folder: Path) -> list[int]:
  """Return the rounds of which there is a checkpoint, in order.

  A folder without a file is none: some tools leave it of one that is removed.
  """
  found = [path for path in folder.glob("*") if path.name.isdecimal()]
  return sorted(int(path.name) for path in found if _has_file(path))


def _has_file(folder: Path) -> bool:
  return any(path.is_file() for path in folder.rglob("*"))


def key(leaf: int, piece: int | None = None) -> str:
  """Return the name of an array in a checkpoint.

  Args:
    leaf: its number among the state's leaves.
    piece: its number among the pieces of a process; None for a whole array.
  """
  return f"leaf{leaf:05d}" + ("" if piece is None else f"_{piece:05d}")


def pieces_folder(checkpoint: Path, process: int) -> Path:
  """Return the folder of a process's pieces."""
  return checkpoint / _PIECES.format(process)


def sums_of(folder: Path) -> dict[str, str]:
  """Return the SHA-256 of each file that the folder's sums are about."""
  return {name: _sum(folder / name) for name in _names(folder)}


def check_files(
  folder: Path, part: str = "", share: tuple[int, int] = (0, 1)
) -> None:
  """Raise ValueError or OSError for a file that is not as it was written.

  Args:
    folder: of the checkpoint.
    part: which of its folders; "" for all.
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
    if name not in wanted or (mine and _sum(folder / name) != wanted[name]):
      raise ValueError(f"the SHA-256 of {name} differs")
  if not part:
    for below in sorted(folder.glob(_PIECES.format("*"))):
      check_files(below, share=share)


def _names(folder: Path) -> list[str]:
  """Return the files that the folder's sums are about, in order."""
  names = []
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    inner = _IN_PIECES.fullmatch(name)
    own = name != SUMS if inner is None else inner[2] == SUMS
    if own and path.is_file():
      names.append(name)
  return names


def _sum(path: Path) -> str:
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
