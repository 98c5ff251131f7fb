"""Another revision of this repository, as files in a folder, for a while."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_ENDS = (signal.SIGTERM, signal.SIGHUP)  # Ctrl-C is an exception already


class RevisionError(RuntimeError):
  """A revision cannot be had; the message is one line and says why."""


class Tree(NamedTuple):
  """Files of a revision.

  Attributes:
    name: what reports call it.
    root: folder that `fedjax_sim` lies in.
    commit: SHA-1 that the files are of.
    changed: whether they differ from the commit's.
  """

  name: str
  root: Path
  commit: str
  changed: bool


def working(root: Path) -> Tree:
  """Return the working tree at `root`, with all that is not committed.

  Raises:
    RevisionError: it is none.
  """
  top = Path(git(root, "rev-parse", "--show-toplevel")).resolve()
  if top != root.resolve():
    raise RevisionError(f"{root} is not the top of a repository, {top} is")
  _refuse_submodules(root, "the working tree")
  commit = git(root, "rev-parse", "HEAD")
  changed = bool(git(root, "status", "--porcelain"))
  return Tree("working tree", root, commit, changed)


@contextlib.contextmanager
def checked_out(root: Path, name: str, folder: Path) -> Iterator[Tree]:
  """Have a revision's files in a worktree of git's, removed at the end.

  It is removed after Ctrl-C and SIGTERM, too.

  Args:
    root: top of the repository.
    name: anything that git takes for a commit, such as `main` or `HEAD~2`.
    folder: where to put them; must not be there.

  Raises:
    RevisionError: there is no such revision, or git cannot check it out.
  """
  wanted = ["--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
  missing = (
    f"--against={name!r} is no revision of {root}: give a branch, a tag or a"
    " commit, such as main or HEAD~1"
  )
  commit = git(root, "rev-parse", *wanted, failure=missing)
  try:
    git(root, "worktree", "add", "--detach", str(folder), commit)
    _refuse_submodules(folder, name)
    yield Tree(name, folder, commit, False)
  finally:
    with _undisturbed(), contextlib.suppress(RevisionError):
      git(root, "worktree", "remove", "--force", "--force", str(folder))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
  """Have an empty folder, removed at the end, after SIGTERM and SIGHUP, too."""

  def end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)

  before = {number: signal.signal(number, end) for number in _ENDS}
  folder = Path(tempfile.mkdtemp(prefix="compare-")).resolve()
  try:
    yield folder
  finally:
    with _undisturbed():
      shutil.rmtree(folder, ignore_errors=True)
    for number, handler in before.items():
      signal.signal(number, handler)


def git(root: Path, *arguments: str, failure: str | None = None) -> str:
  """Return what git prints.

  Args:
    root: where to run it.
    arguments: of its command line.
    failure: what to say if it fails; None: what it says.

  Raises:
    RevisionError: it is not installed, or fails.
  """
  # Of a hook that calls this, the variables name another worktree and index.
  environment = {k: v for k, v in os.environ.items() if k[:4] != "GIT_"}
  command = ["git", "-C", str(root), "-c", "core.hooksPath=/dev/null"]
  try:
    done = subprocess.run(
      [*command, *arguments],
      capture_output=True,
      text=True,
      check=False,
      env=environment,
      stdin=subprocess.DEVNULL,
    )
  except FileNotFoundError as error:
    raise RevisionError("git is not installed") from error
  if done.returncode:
    told = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    raise RevisionError(failure or f"git {arguments[0]}: {told[-1]}")
  return done.stdout.strip()


def _refuse_submodules(root: Path, name: str) -> None:
  if (root / ".gitmodules").exists():
    raise RevisionError(f"{name} has submodules, which would not be compared")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
  """Let a second Ctrl-C wait until what must be done is done."""
  numbers = (signal.SIGINT, *_ENDS)
  before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
