"""The local folder in which a run works whose workdir is in a bucket.

It has its place in the user's cache. Before a run begins it is filled from the
bucket, unless it is ahead: a run that was killed while the network was gone has
got farther than its copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from fedjax_sim.core import urls
from fedjax_sim.run.bucket.folder import Bucket
from fedjax_sim.run.bucket.lock import LOCK
from fedjax_sim.run.checkpoint_files import SUMS, check_files, rounds_in
from fedjax_sim.run.workdir import WorkdirError

IDENTITY = "bucket.json"  # names the run that a bucket holds a copy of
_BEFORE = ".before-"  # and a number end the name of what was set aside
SENT = ".sent"  # in a staging folder of which the bucket has got a copy
_CHECKPOINT = re.compile(r"checkpoints/(\d+)/(.+)")


def folder_of(url: str) -> Path:
  """Return the staging folder of a workdir in a bucket.

  Args:
    url: of the workdir; what is secret in it makes no difference, so that a
      new password or signature leads to the same folder.
  """
  # Neither names nor digests of passwords: who lists the cache could guess.
  url = urls.redacted_url(url.rstrip("/"))
  cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  name = re.sub(r"[^A-Za-z0-9.]+", "-", url).strip("-.")[-60:]
  key = hashlib.sha256(url.encode()).hexdigest()[:12]
  return cache / "fedjax_sim" / "workdirs" / f"{name}-{key}"


def checkpoint_of(name: str) -> int | None:
  """Return the round of the checkpoint that a file is of; None for others."""
  found = _CHECKPOINT.fullmatch(name)
  return int(found[1]) if found else None


def complete_rounds(names: Mapping[str, object]) -> list[int]:
  """Return the rounds of the complete checkpoints in a bucket, in order.

  Args:
    names: the files there.
  """
  found = [_CHECKPOINT.fullmatch(name) for name in names]
  return sorted(int(f[1]) for f in found if f and f[2] == SUMS)


def identity_of(content: bytes | None) -> str | None:
  """Return the run that the content of `bucket.json` names; None without."""
  with contextlib.suppress(ValueError, KeyError, TypeError):
    return str(json.loads(content or b"")["run"])
  return None


def fill(folder: Path, bucket: Bucket, say: Callable[[str, str], None]) -> None:
  """Bring a staging folder to the state of its bucket, unless it is ahead.

  The folder is replaced as a whole. What was there is kept beside it, if it is
  of another run.

  Args:
    folder: the staging folder; it may be missing.
    bucket: with the run's copy, or empty.
    say: is given what was done, a line each, and its level.

  Raises:
    OSError: the network, the bucket or the disk fails.
    WorkdirError: the bucket lists a file that is outside of its folder, or has
      checkpoints of which none is whole.
  """
  there = bucket.sizes()
  if not folder.exists() and (asides := _set_aside_before(folder)):
    # Whoever set the last one aside may have been killed before it said so.
    kept = ", ".join(map(str, asides))
    say(f"What was in {folder} earlier is in {kept}.", "warning")
  local = _read(folder / IDENTITY)
  if "config.json" not in there:
    if (folder / SENT).exists():  # somebody has emptied the bucket
      text = f"holds no run any more; what was here is in {_set_aside(folder)}"
      say(f"{bucket.name} {text}.", "warning")
    return
  copy = bucket.read(IDENTITY) if IDENTITY in there else None
  same = local is not None and identity_of(local) == identity_of(copy)
  newest = complete_rounds(there)[-1:] or [-1]
  if same and _progress(folder) >= (newest[0], "summary.json" in there):
    return
  new = folder.with_name(f"{folder.name}.fetched")
  shutil.rmtree(new, ignore_errors=True)
  _fetch(bucket, there, folder, new)
  for round_ in rounds_in(new / "checkpoints"):
    path = new / "checkpoints" / str(round_)
    if damage := _damage(path):
      text = f"the checkpoint of round {round_} is damaged: {damage}"
      say(f"{bucket.name}: {text}.", "warning")
      shutil.rmtree(path)
  if not rounds_in(new / "checkpoints"):
    _show_whether_it_begins(new, there)
  if same and _progress(folder) > _progress(new):
    shutil.rmtree(new)
    return
  if complete_rounds(there) and not rounds_in(new / "checkpoints"):
    shutil.rmtree(new)
    raise WorkdirError(
      f"{bucket.name}: none of its checkpoints is whole; restore the objects,"
      " or begin anew in another --workdir."
    )
  aside = _set_aside(folder) if folder.exists() else None
  new.rename(folder)
  (folder / SENT).touch()
  done = rounds_in(folder / "checkpoints")
  last = f", with its checkpoint of round {done[-1]}" if done else ""
  say(f"{bucket.name}: fetched the run{last}.", "info")
  if aside is None:
    return
  if same:
    shutil.rmtree(aside)
  else:
    say(f"Another run that was in {folder} is now in {aside}.", "warning")


def _fetch(
  bucket: Bucket, there: Mapping[str, int], folder: Path, new: Path
) -> None:
  """Fetch all but incomplete checkpoints; take from `folder` what it has.

  Raises:
    WorkdirError: a file there would lie outside of `new`.
  """
  new.mkdir(parents=True)
  complete = complete_rounds(there)
  same = {}
  for round_ in complete:
    sums = f"checkpoints/{round_}/{SUMS}"
    same[round_] = _read(folder / sums) == bucket.read(sums) and not _damage(
      folder / f"checkpoints/{round_}"
    )
  inside = new.resolve()
  for name in there:
    if not (new / name).resolve().is_relative_to(inside):
      raise WorkdirError(
        f"{bucket.name} lists {name!r}, which is outside of the workdir; remove"
        " that object."
      )
    of = checkpoint_of(name)
    if name == LOCK or (of is not None and of not in complete):
      continue
    path = new / name
    if of is not None and same[of] and (folder / name).is_file():
      path.parent.mkdir(parents=True, exist_ok=True)
      os.link(folder / name, path)
    else:
      bucket.fetch(name, path)


def _show_whether_it_begins(new: Path, there: Mapping[str, int]) -> None:
  """Leave an empty folder of checkpoints if the run never had one.

  So it may begin anew, as where it was killed; buckets keep no empty folders.

  Args:
    new: what was fetched, without any whole checkpoint.
    there: the files in the bucket.
  """
  saved = new / "checkpoints"
  shutil.rmtree(saved, ignore_errors=True)
  begun = any(checkpoint_of(name) is not None for name in there)
  if begun and not complete_rounds(there):
    saved.mkdir()


def _damage(checkpoint: Path) -> str:
  """Return what is wrong with a checkpoint's files; "" if nothing is."""
  try:
    check_files(checkpoint)
  except (ValueError, OSError) as error:
    return str(error)
  return ""


def _progress(folder: Path) -> tuple[int, bool]:
  """Return the newest checkpoint's round, and whether the run is finished."""
  rounds = rounds_in(folder / "checkpoints")
  return max(rounds, default=-1), (folder / "summary.json").exists()


def _read(path: Path) -> bytes | None:
  try:
    return path.read_bytes()
  except OSError:
    return None


def _set_aside(folder: Path) -> Path:
  """Rename a folder, out of the way; return its new name, an unused one."""
  names = (f"{folder.name}{_BEFORE}{number}" for number in itertools.count(1))
  asides = (folder.with_name(name) for name in names)
  aside = next(path for path in asides if not path.exists())
  folder.rename(aside)
  return aside


def _set_aside_before(folder: Path) -> list[Path]:
  """Return what was set aside of a folder, in the order of the names."""
  prefix = folder.name + _BEFORE
  found = [p for p in folder.parent.glob("*") if p.name.startswith(prefix)]
  return sorted(found, key=lambda path: (len(path.name), path.name))
