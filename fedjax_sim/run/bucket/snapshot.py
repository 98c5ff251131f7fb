"""Snapshots of a workdir, of hard links: no bytes are copied.

A snapshot keeps what the run removes or replaces afterwards. A file that only
grows, such as `metrics.jsonl`, counts with the size that it had.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedjax_sim.run.bucket.staging import complete_rounds

FOLDER = ".snapshots"  # of a workdir
# What a snapshot leaves out: hidden files, and checkpoints that are none.
_LOCAL = re.compile(r"(?!checkpoints/\d+/)(.*/)?\.|checkpoints/(?!\d+/)")


class Stamp(NamedTuple):
  """A file as it was; another one has another stamp."""

  inode: int
  size: int
  changed: int


class Snapshot(NamedTuple):
  """The workdir as it was.

  Attributes:
    folder: of links to the files.
    files: path in the workdir -> the file.
  """

  folder: Path
  files: dict[str, Stamp]

  def checkpoints(self) -> list[int]:
    """Return the rounds of the checkpoints, in order."""
    return complete_rounds(self.files)


def take(workdir: Path, number: int) -> Snapshot:
  """Return a snapshot of a workdir as it is now.

  Args:
    workdir: where no checkpoint may be written or removed meanwhile.
    number: of the snapshot, another one for each.

  Raises:
    OSError: the disk is full or refuses.
  """
  links = workdir / FOLDER / str(number)
  files: dict[str, Stamp] = {}
  for path in _files(workdir):
    name = path.relative_to(workdir).as_posix()
    if _LOCAL.match(name):
      continue
    link = links / name
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it has just been removed
      own = path.stat().st_ino  # a copy has another one
      _link(path, link)
      facts = link.stat()
      files[name] = Stamp(own, facts.st_size, facts.st_mtime_ns)
  return Snapshot(links, files)


def forget(snapshot: Snapshot) -> None:
  """Remove a snapshot and those before it."""
  last = int(snapshot.folder.name)
  with contextlib.suppress(OSError):
    for path in snapshot.folder.parent.iterdir():
      if int(path.name) <= last:
        shutil.rmtree(path, ignore_errors=True)


def forget_all(workdir: Path) -> None:
  """Remove all snapshots of a workdir."""
  shutil.rmtree(workdir / FOLDER, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
  """Yield the files below a folder, but for links and snapshots."""
  found: list[os.DirEntry[str]] = []
  # What other libraries keep here may go at any moment.
  with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
    found = sorted(entries, key=lambda entry: entry.name)
  for entry in found:
    if entry.name == FOLDER:
      continue
    if entry.is_dir(follow_symlinks=False):
      yield from _files(Path(entry.path))
    elif entry.is_file(follow_symlinks=False):
      yield Path(entry.path)


def _link(path: Path, link: Path) -> None:
  """Make a hard link, or a copy where the file system has no links."""
  try:
    os.link(path, link)
  except FileNotFoundError:
    raise
  except OSError:
    shutil.copy2(path, link)
