"""Stores in buckets: copied whole, to the local disk or from it."""

from __future__ import annotations

import contextlib
import os
import posixpath
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedjax_sim.core import urls
from fedjax_sim.data import remote
from fedjax_sim.data.location import is_url
from fedjax_sim.data.store.reader import StoreError, facts_of, verify
from fedjax_sim.data.store.rewrite import Told


def copy_store(source: str, to: str, progress: Told | None = None) -> None:
  """Copy a store between a bucket and the local disk.

  A folder gets its name after all checksums were compared. A bucket holds a
  store once `store.json` is there, which is sent last.

  Args:
    source: the store's folder, or its URL.
    to: the copy's URL, or its folder, which must not be there yet.
    progress: see `write_store`.

  Raises:
    FileExistsError: there is something at `to`.
    FileNotFoundError: there is no store at `source`.
    ModuleNotFoundError: fsspec, or what it needs for this bucket, is missing.
    OSError: the network, the bucket or the disk fails; nothing is left of it on
      the disk, and no store in the bucket.
    StoreError: the store is damaged.
    ValueError: neither or both of them are URLs.
  """
  if is_url(source) == is_url(to):
    raise ValueError(
      f"Of {_named(source)} and {_named(to)} one has to be a URL, such as"
      " gs://bucket/store, and the other a folder."
    )
  if is_url(source):
    _fetch(source, Path(to), progress)
  else:
    _send(Path(source), to, progress)


def _fetch(url: str, path: Path, progress: Told | None) -> None:
  if path.exists() or path.is_symlink():
    raise FileExistsError(f"{path} is there already; give another name.")
  bucket, base = remote.file_system_of(url)
  path.parent.mkdir(parents=True, exist_ok=True)
  name = f".{path.name[:40]}."
  with tempfile.TemporaryDirectory(prefix=name, dir=path.parent) as made:
    folder = Path(made) / "store"
    folder.mkdir()

    def get(file: str) -> None:
      place = folder / file
      place.parent.mkdir(parents=True, exist_ok=True)
      with _copying(url, file):
        bucket.get_file(posixpath.join(base, file), str(place))

    try:
      get("store.json")
    except FileNotFoundError:
      raise FileNotFoundError(
        f"{_named(url)} is no store: it holds no store.json. Correct the URL."
      ) from None
    try:
      for file in _files(folder, progress):
        get(file)
      verify(folder)
    except StoreError as error:
      raise StoreError(str(error).replace(str(folder), _named(url))) from error
    for place in folder.rglob("*"):
      if place.is_file():
        _sync(place)
    if path.exists():
      raise FileExistsError(f"{path} was made meanwhile; remove it.")
    folder.rename(path)


def _send(folder: Path, url: str, progress: Told | None) -> None:
  verify(folder)
  bucket, base = remote.file_system_of(url)
  last = posixpath.join(base, "store.json")
  with _copying(url, "store.json"):
    there = bucket.exists(last)
  if there:
    raise FileExistsError(
      f"{_named(url)} is a store already; give another name."
    )
  for file in [*_files(folder, progress), "store.json"]:
    place = posixpath.join(base, file)
    with _copying(url, file):
      # Of an object store's folders it would make the bucket.
      if remote.has_folders(place):
        bucket.makedirs(posixpath.dirname(place), exist_ok=True)
      bucket.put_file(str(folder / file), place)


def _files(folder: Path, progress: Told | None) -> Iterator[str]:
  """Yield a store's files but for `store.json`, split by split."""
  for name, split in facts_of(folder)["splits"].items():
    for file in split["files"]:
      yield f"{name}/{file}"
    if progress:
      shapes = {k: said["shape"] for k, said in split["files"].items()}
      progress(name, shapes["offsets.npy"][0] - 1, _rows(shapes))


def _rows(shapes: dict[str, Any]) -> int:
  return next(s[0] for k, s in shapes.items() if k.startswith("fields/"))


def _named(place: str) -> str:
  """Return a folder or a URL as messages show it."""
  return urls.redacted_url(place)


def _copying(url: str, file: str) -> contextlib.AbstractContextManager[None]:
  return remote.naming(url, f"{file} cannot be copied")


def _sync(file: Path) -> None:
  with file.open("rb+") as opened:
    os.fsync(opened.fileno())
