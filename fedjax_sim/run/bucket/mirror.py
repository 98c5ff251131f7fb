"""A copy of the workdir in a bucket, brought up to date by a thread.

After each checkpoint a snapshot is taken, and the thread sends what is new of
it. One snapshot waits at most; a newer one takes its place.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from fedjax_sim.core import urls
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.files import write_json
from fedjax_sim.data import is_url
from fedjax_sim.distributed import processes
from fedjax_sim.run.bucket import snapshot as snapshots
from fedjax_sim.run.bucket import staging
from fedjax_sim.run.bucket.folder import Bucket
from fedjax_sim.run.bucket.lock import Lock
from fedjax_sim.run.bucket.sender import Sender
from fedjax_sim.run.bucket.snapshot import Snapshot
from fedjax_sim.run.bucket.staging import IDENTITY, identity_of
from fedjax_sim.run.workdir import WorkdirError, locked

START_SECONDS = 10.0  # that the start of a run waits for a bucket's answer


class CopyError(FedjaxSimError, RuntimeError):
  """A run is finished, but its copy is not complete."""

  exit_code = 1


class Place(NamedTuple):
  """Where a run works.

  Attributes:
    folder: on the local disk.
    name: what the user calls it, without passwords.
    mirror: copies it; None if nothing does.
  """

  folder: Path
  name: str
  mirror: Mirror | None

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Keep other processes out of the folder, and copy it meanwhile.

    At the end, wait until the copy is complete.

    Raises:
      CopyError: it is not, though nothing else went wrong.
      WorkdirError: another process uses the folder, of which nothing is
        copied or removed then; or it cannot be written.
    """
    with locked(self.folder), self.mirror or contextlib.nullcontext():
      yield


@contextlib.contextmanager
def placed(
  workdir: str | os.PathLike[str], sync_to: str | None
) -> Iterator[Place]:
  """Yield where a run works, and keep other runs out of its bucket.

  With several processes the first one alone copies.

  Args:
    workdir: a folder, or a URL, for which there is a staging folder.
    sync_to: URL of the copy of a folder; None for none.

  Raises:
    ModuleNotFoundError: what this URL needs is not installed.
    OSError: a workdir in a bucket cannot be read or written.
    ValueError: a URL is none, or both of them are URLs, or one is of the folder
      that it would be the copy of.
    WorkdirError: another run uses the bucket, or it holds another run.
  """
  name = os.fspath(workdir)
  if sync_to == "":
    raise ValueError("--sync-to= is empty; give a URL or leave it out.")
  named = urls.redacted_url(name)
  if sync_to is not None and not is_url(sync_to):
    raise ValueError(
      f"--sync-to={sync_to} is no URL, such as s3://bucket/run; give one."
    )
  if sync_to is not None and is_url(name):
    raise ValueError(
      f"--sync-to={urls.redacted_url(sync_to)}: --workdir={named} is in a"
      " bucket already; give one of them."
    )
  url = name if is_url(name) else sync_to
  if url is None:
    yield Place(Path(workdir), named, None)
    return
  folder = staging.folder_of(name) if is_url(name) else Path(workdir)
  with contextlib.ExitStack() as stack:
    mirror: Mirror | None = None

    def begin() -> None:
      nonlocal mirror
      assert url is not None
      bucket = Bucket(url)
      if bucket.overlaps(folder):
        flag = "--workdir" if is_url(name) else "--sync-to"
        raise ValueError(
          f"{flag}={bucket.name} and {folder}, which is copied there, are or"
          " hold one another; give a URL outside of it."
        )
      found = Mirror(folder, bucket)
      if is_url(name):
        found.fill()
      else:
        found.meet()
      mirror = stack.enter_context(contextlib.closing(found))

    processes.from_first(begin)
    yield Place(folder, named, mirror)


class Mirror:
  """Copies a workdir to a bucket; leaving the context waits for the last copy.

  The context is for who has the workdir's lock. The bucket's lock is held from
  `fill` or `meet` on, until `close`.

  Args:
    folder: the workdir.
    bucket: where the copy is.
  """

  def __init__(self, folder: Path, bucket: Bucket):
    self._folder, self._bucket = folder, bucket
    self._lock = Lock(bucket, _print)
    self._owns = False  # whether the bucket is known to hold this run or none
    self._adopts = False  # whether a run there is this one
    self._sender = Sender(bucket)
    self._taken = 0  # snapshots
    self._says: list[tuple[str, str]] = []
    self._owning = threading.Lock()
    self._failure = ""  # of the last copy; "" if it was complete
    self._missed = False  # whether there is no snapshot of the last state
    self._changed = threading.Condition()
    self._waiting: Snapshot | None = None
    self._busy = False
    self._ends = False

  def fill(self) -> None:
    """Fill the workdir from the bucket, whose lock this process then has.

    Raises:
      WorkdirError: another run uses the bucket or the workdir.
      OSError: the network, the bucket or the disk fails.
    """
    self._lock.take()
    try:
      exists = self._folder.exists()
      with locked(self._folder) if exists else contextlib.nullcontext():
        staging.fill(self._folder, self._bucket, self._say)
      self._say(f"{self._bucket.name} is worked on in {self._folder}.")
      if self._bucket.is_volatile:
        self._say(
          f"--workdir={self._bucket.name} ends with this process; give a"
          " folder, or a URL of a bucket, for what is to stay.",
          level="warning",
        )
      self._adopts = True
    except BaseException:
      self.close()
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
      self.close()
      raise refused[0]
    if thread.is_alive():
      self._say(
        f"It is not known yet whether {self._bucket.name} can have the copy.",
        level="warning",
      )

  def __enter__(self) -> Mirror:
    snapshots.forget_all(self._folder)
    threading.Thread(target=self._work, daemon=True).start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    try:
      lacks = ""
      if error is None or isinstance(error, Exception):
        lacks = self._finish()
    finally:
      snapshots.forget_all(self._folder)
    if not lacks:
      return
    if error is None:
      raise CopyError(
        f"The run in {self._folder} is finished, but its copy is not complete:"
        f" {lacks}. The same command sends the rest."
      )
    _print(
      f"{lacks}. All of it is in {self._folder}; the same command sends the"
      " rest."
    )

  def close(self) -> None:
    """Give the bucket's lock back."""
    self._lock.release()

  def copy(self) -> None:
    """Copy the workdir as it is now; return before it is copied.

    To be called when a checkpoint is committed, and while none is written.
    """
    try:
      snapshot = self._snapshot()
    except OSError as error:
      self._missed = True
      self._fail(error)
      return
    self._missed = False
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
      self._says.append((urls.redacted(message), level))

  def _fail(self, error: Exception) -> None:
    """Note an error, and say so if the copy before was complete."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = urls.redacted(text)
    before, self._failure = self._failure, text
    if not before:
      self._say(
        f"The copy of the run is not up to date: {self._failure}. The run goes"
        " on, and copies again at the next checkpoint.",
        level="warning",
      )

  def _finish(self) -> str:
    """Copy the last state and wait for it; return what is missing, and why."""
    self.copy()
    with self._changed:
      self._ends = True
      self._changed.notify_all()
      if not self._changed.wait_for(self._is_done, 5.0):
        _print(f"Waiting for the copy in {self._bucket.name}.")
        self._changed.wait_for(self._is_done)
    left = self.messages()
    if not self._failure:
      return ""
    for message, _ in left:
      _print(message)
    lacking = ["the last state"]
    if not self._missed:
      snapshot = self._snapshot()
      lacking = [] if snapshot is None else self._sender.lacking(snapshot)
    what = f"lacks {', '.join(lacking)}" if lacking else "is not up to date"
    return f"{self._bucket.name} {what}: {self._failure.rstrip('.')}"

  def _is_done(self) -> bool:
    return self._waiting is None and not self._busy

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
        self._own()
        self._sender.send(snapshot, self._lock.check)
        (self._folder / staging.SENT).touch()
      except Exception as error:  # whatever a bucket's library raises
        self._fail(error)
      else:
        if self._failure and not self._missed:
          self._failure = ""
          self._say(f"The copy in {self._bucket.name} is up to date again.")
      finally:
        snapshots.forget(snapshot)
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
    return snapshots.take(self._folder, self._taken)

  def _own(self) -> None:
    """Take the bucket's lock, if that was not done; refuse another run's."""
    with self._owning:
      self._lock.take()
      self._lock.check()  # it may have been lost since
      if not (self._owns or self._adopts):
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
        f"{self._bucket.name} holds another run than {self._folder}: give"
        " another URL, or go on with that one by"
        f" --workdir={self._bucket.name}."
      )


def _print(message: str) -> None:
  print(urls.redacted(message), file=sys.stderr)  # noqa: T201
