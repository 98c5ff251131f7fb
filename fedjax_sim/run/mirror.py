"""A copy of the workdir in a bucket, brought up to date by a thread.

After a checkpoint a snapshot of the workdir is taken, of hard links, which
costs no copy and keeps what the run removes or replaces meanwhile. A thread
sends what is new of it. One snapshot waits at most; a newer one takes its
place.

Whenever the copying stops, the bucket holds a run that can go on: metrics are
sent before the checkpoint that needs them, of a checkpoint the file of sums
last, `summary.json` after all else, and what has to go is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from fedjax_sim.core.files import write_json
from fedjax_sim.data import is_url
from fedjax_sim.distributed import processes
from fedjax_sim.run import staging
from fedjax_sim.run.bucket import Bucket, Lock
from fedjax_sim.run.checkpoint import SUMS
from fedjax_sim.run.staging import IDENTITY, checkpoint_of, identity_of
from fedjax_sim.run.workdir import WorkdirError

SUMMARY = "summary.json"
START_SECONDS = 10.0  # that the start of a run waits for a bucket's answer
_OWN = re.compile(r"checkpoints/\d+/|client_rounds/")  # what may be removed
# What is not sent: hidden files, and checkpoints that are none.
_LOCAL = re.compile(r"(?!checkpoints/\d+/)(.*/)?\.|checkpoints/(?!\d+/)")
_SNAPSHOTS = ".snapshots"  # folder of a workdir


class Place(NamedTuple):
  """Where a run works.

  Attributes:
    folder: on the local disk.
    name: what the user calls it.
    mirror: copies it; None if nothing does.
  """

  folder: Path
  name: str
  mirror: Mirror | None


@contextlib.contextmanager
def placed(
  workdir: str | os.PathLike[str], sync_to: str | None
) -> Iterator[Place]:
  """Yield where a run works; at the end, wait until its copy is complete.

  With several processes the first one alone copies.

  Args:
    workdir: a folder, or a URL, for which there is a staging folder.
    sync_to: URL of the copy of a folder; None for none.

  Raises:
    ModuleNotFoundError: what this URL needs is not installed.
    OSError: a workdir in a bucket cannot be read or written.
    ValueError: a URL is none, or both of them are URLs.
    WorkdirError: another run uses the bucket, or it holds another run.
  """
  name = os.fspath(workdir)
  if sync_to is not None and not is_url(sync_to):
    raise ValueError(
      f"--sync-to={sync_to} is no URL, such as s3://bucket/run; give one."
    )
  if sync_to is not None and is_url(name):
    raise ValueError(
      f"--sync-to={sync_to}: --workdir={name} is in a bucket already; give one"
      " of them."
    )
  url = name if is_url(name) else sync_to
  if url is None:
    yield Place(Path(workdir), name, None)
    return
  folder = staging.folder_of(name) if is_url(name) else Path(workdir)
  with contextlib.ExitStack() as stack:
    mirror: Mirror | None = None

    def begin() -> None:
      nonlocal mirror
      assert url is not None
      found = Mirror(folder, Bucket(url))
      if is_url(name):
        found.fill()
      else:
        found.meet()
      mirror = stack.enter_context(found)

    processes.from_first(begin)
    yield Place(folder, name, mirror)


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
    return staging.complete_rounds(self.files)


class Mirror:
  """Copies a workdir to a bucket; leaving the context waits for the last copy.

  Args:
    folder: the workdir.
    bucket: where the copy is.
  """

  def __init__(self, folder: Path, bucket: Bucket):
    self._folder, self._bucket = folder, bucket
    self._lock = Lock(bucket)
    self._owns = False  # whether the bucket is known to hold this run or none
    self._adopts = False  # whether a run there is this one
    self._there: dict[str, int] | None = None  # the bucket's files
    self._sent: dict[str, Stamp] = {}
    self._taken = 0  # snapshots
    self._says: list[tuple[str, str]] = []
    self._owning = threading.Lock()
    self._failure = ""  # of the last copy; "" if it was complete
    self._changed = threading.Condition()
    self._waiting: Snapshot | None = None
    self._busy = False
    self._ends = False

  def fill(self) -> None:
    """Fill the workdir from the bucket, whose lock this process then has.

    Raises:
      WorkdirError: another run uses the bucket.
      OSError: the network, the bucket or the disk fails.
    """
    self._lock.take()
    try:
      staging.fill(self._folder, self._bucket, self._say)
      self._say(f"{self._bucket.url} is worked on in {self._folder}.")
      self._adopts = True
    except BaseException:
      self._lock.release()
      raise

  def meet(self) -> None:
    """Find out for some seconds whether the bucket may have the copy.

    Raises:
      WorkdirError: another run uses the bucket, or it holds another run.
    """
    refused: list[WorkdirError] = []

    def look() -> None:
      try:
        self._own()
      except WorkdirError as error:
        refused.append(error)
      except OSError as error:
        self._fail(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(START_SECONDS)
    if refused:
      self._lock.release()
      raise refused[0]
    if thread.is_alive():
      self._say(f"{self._bucket.url} has not answered yet.", level="warning")

  def __enter__(self) -> Mirror:
    shutil.rmtree(self._folder / _SNAPSHOTS, ignore_errors=True)
    threading.Thread(target=self._work, daemon=True).start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    try:
      if error is None or isinstance(error, Exception):
        self._finish()
    finally:
      self._lock.release()
      shutil.rmtree(self._folder / _SNAPSHOTS, ignore_errors=True)

  def copy(self) -> None:
    """Copy the workdir as it is now; return before it is copied.

    To be called when a checkpoint is committed, and while none is written.
    """
    try:
      snapshot = self._snapshot()
    except OSError as error:
      self._fail(error)
      return
    if snapshot is None:
      return
    with self._changed:
      self._waiting = snapshot
      self._changed.notify_all()

  def messages(self) -> list[tuple[str, str]]:
    """Return what there is to say since the last call, each with its level."""
    with self._changed:
      says, self._says = self._says, []
    return says

  def _say(self, message: str, level: str = "info") -> None:
    with self._changed:
      self._says.append((message, level))

  def _fail(self, error: Exception) -> None:
    """Note an error, and say so if the copy before was complete."""
    before, self._failure = self._failure, " ".join(str(error).split())
    if not before:
      self._say(
        f"The copy of the run is not up to date: {self._failure}. The run goes"
        " on, and copies again at the next checkpoint.",
        level="warning",
      )

  def _finish(self) -> None:
    """Copy the last state, wait for it, and say what is missing."""
    self.copy()
    with self._changed:
      self._ends = True
      self._changed.notify_all()
      if not self._changed.wait_for(self._is_done, 5.0):
        _print(f"Waiting for the copy in {self._bucket.url}.")
        self._changed.wait_for(self._is_done)
    left = self.messages()
    if not self._failure:
      return
    for message, _ in left:
      _print(message)
    snapshot = self._snapshot()
    lacking = [] if snapshot is None else self._lacking(snapshot)
    _print(
      f"{self._bucket.url} lacks {', '.join(lacking) or 'nothing'}:"
      f" {self._failure}. All of it is in {self._folder}; the same command"
      " sends the rest."
    )

  def _is_done(self) -> bool:
    return self._waiting is None and not self._busy

  def _lacking(self, snapshot: Snapshot) -> list[str]:
    """Return what was not sent, a checkpoint as one."""
    names = [
      "/".join(name.split("/")[:2]) if checkpoint_of(name) is not None else name
      for name, stamp in snapshot.files.items()
      if self._sent.get(name) != stamp
    ]
    found = list(dict.fromkeys(sorted(names)))
    return [*found[:8], *(["..."] if len(found) > 8 else [])]

  def _work(self) -> None:
    """Copy what waits, until the end."""
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._waiting or self._ends)
        snapshot, self._waiting = self._waiting, None
        if snapshot is None:
          return
        self._busy = True
      try:
        self._send(snapshot)
      except Exception as error:  # whatever a bucket's library raises
        self._fail(error)
      else:
        if self._failure:
          self._failure = ""
          self._say(f"The copy in {self._bucket.url} is up to date again.")
      finally:
        self._forget_older(snapshot)
        with self._changed:
          self._busy = False
          self._changed.notify_all()

  def _snapshot(self) -> Snapshot | None:
    """Return the workdir as it is now; None if it holds no run."""
    if not (self._folder / "config.json").exists():
      return None
    identity = self._folder / IDENTITY
    if not identity.exists():
      write_json(identity, {"run": uuid.uuid4().hex})
    self._taken += 1
    links = self._folder / _SNAPSHOTS / str(self._taken)
    files: dict[str, Stamp] = {}
    for path in _files(self._folder):
      name = path.relative_to(self._folder).as_posix()
      if _LOCAL.match(name):
        continue
      link = links / name
      link.parent.mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileNotFoundError):  # it has just been replaced
        _link(path, link)
        facts = link.stat()
        own = path.stat().st_ino  # a copy has another one
        files[name] = Stamp(own, facts.st_size, facts.st_mtime_ns)
    return Snapshot(links, files)

  def _forget_older(self, snapshot: Snapshot) -> None:
    """Remove this snapshot and those that it took the place of."""
    last = int(snapshot.folder.name)
    with contextlib.suppress(OSError):
      for path in snapshot.folder.parent.iterdir():
        if int(path.name) <= last:
          shutil.rmtree(path, ignore_errors=True)

  def _own(self) -> None:
    """Take the bucket's lock, if that was not done; refuse another run's."""
    with self._owning:
      if self._owns:
        self._lock.check()
        return
      self._lock.take()
      if not self._adopts:
        self._refuse_other_run()
      self._owns = True

  def _refuse_other_run(self) -> None:
    there = self._bucket.sizes()
    copy = self._bucket.read(IDENTITY) if IDENTITY in there else None
    path = self._folder / IDENTITY
    own = identity_of(path.read_bytes()) if path.exists() else None
    known = own is not None and own == identity_of(copy)
    if not known and (copy is not None or "config.json" in there):
      raise WorkdirError(
        f"{self._bucket.url} holds another run than {self._folder}: give"
        " another URL, or go on with that one by"
        f" --workdir={self._bucket.url}."
      )

  def _send(self, snapshot: Snapshot) -> None:
    """Make the bucket hold what a snapshot holds."""
    self._own()
    if self._there is None:
      self._there = self._bucket.sizes()
    files, rounds = snapshot.files, snapshot.checkpoints()
    if SUMMARY not in files:  # a finished run has got more rounds
      self._remove(SUMMARY)
    for name, stamp in files.items():
      if name.startswith("client_rounds/"):  # a name there has one content
        if self._there.get(name) == stamp.size:
          self._sent[name] = stamp
      if name != SUMMARY and checkpoint_of(name) is None:
        self._put(snapshot, name)
    for round_ in rounds:
      self._put_checkpoint(snapshot, round_)
    if SUMMARY in files:
      self._put(snapshot, SUMMARY)
    if rounds:
      self._lock.check()
      gone = [n for n in self._there if _OWN.match(n) and n not in files]
      for name in sorted(gone, key=lambda n: not n.endswith(f"/{SUMS}")):
        self._remove(name)
    (self._folder / staging.SENT).touch()

  def _put_checkpoint(self, snapshot: Snapshot, round_: int) -> None:
    """Send a checkpoint, its sums last, unless it is there."""
    assert self._there is not None
    prefix = f"checkpoints/{round_}/"
    names = [name for name in snapshot.files if name.startswith(prefix)]
    if all(self._sent.get(name) == snapshot.files[name] for name in names):
      return
    sums = prefix + SUMS
    there = {n: s for n, s in self._there.items() if n.startswith(prefix)}
    if there == {name: snapshot.files[name].size for name in names}:
      if self._bucket.read(sums) == (snapshot.folder / sums).read_bytes():
        self._sent |= {name: snapshot.files[name] for name in names}
        return
    self._remove(sums)  # from here on it is none
    for name in there:
      if name not in names or self._sent.get(name) != snapshot.files[name]:
        self._remove(name)
    for name in names:
      if name != sums:
        self._put(snapshot, name)
    self._put(snapshot, sums)

  def _put(self, snapshot: Snapshot, name: str) -> None:
    """Send a file, unless it is there."""
    assert self._there is not None
    stamp = snapshot.files[name]
    if self._sent.get(name) != stamp or name not in self._there:
      self._bucket.send(snapshot.folder / name, name, stamp.size)
      self._there[name], self._sent[name] = stamp.size, stamp

  def _remove(self, name: str) -> None:
    assert self._there is not None
    if name in self._there:
      self._bucket.remove(name)
      del self._there[name]
    self._sent.pop(name, None)


def _files(folder: Path) -> Iterator[Path]:
  """Yield the files below a folder, but for links and snapshots."""
  found: list[os.DirEntry[str]] = []
  # What other libraries keep here may go at any moment.
  with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
    found = sorted(entries, key=lambda entry: entry.name)
  for entry in found:
    if entry.name == _SNAPSHOTS:
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


def _print(message: str) -> None:
  print(message, file=sys.stderr)  # noqa: T201
