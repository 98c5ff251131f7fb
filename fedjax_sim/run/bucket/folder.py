"""A folder of a bucket: what files it has, and how they come and go."""

from __future__ import annotations

import contextlib
import posixpath
from pathlib import Path, PureWindowsPath
from typing import Any

from fedjax_sim.core import urls
from fedjax_sim.data import remote

_PART = ".part"  # ends the name of a file that is being written
_WHOLE = 2**23  # bytes of a file that is sent in one piece


class Bucket:
  """A folder of a bucket.

  Args:
    url: as fsspec knows it, such as s3://bucket/folder.

  Attributes:
    name: the URL as messages show it, without passwords.

  Raises:
    ModuleNotFoundError: fsspec, or what it needs for this bucket, is missing.
    ValueError: no bucket has such URLs.
  """

  def __init__(self, url: str):
    self._url = url.rstrip("/")
    self.name = urls.redacted_url(self._url)
    self._files, self._base = remote.file_system_of(self._url)
    self._base = self._base.rstrip("/")

  def overlaps(self, folder: Path) -> bool:
    """Return whether one of the two folders is or holds the other one.

    Args:
      folder: on the local disk; it may be missing.
    """
    own = remote.on_disk(self._files, self._base or "/")
    if own is None:
      return False
    return _holds(own, folder) or _holds(folder, own)

  @property
  def is_volatile(self) -> bool:
    """Whether what is here ends with this process."""
    return bool(self._files.protocol == "memory")

  def sizes(self) -> dict[str, int]:
    """Return each file's size in bytes, by its path in the folder.

    Left out is what would lie outside of a folder of the disk by that path.

    Raises:
      OSError: the network or the bucket refuses; so all methods.
    """
    with remote.naming(self._url, "cannot be listed"):
      self._files.invalidate_cache()
      try:
        found = self._files.find(self._base, detail=True)
      except FileNotFoundError:
        return {}
    names = {
      path[len(self._base) + 1 :]: int(facts["size"] or 0)
      for path, facts in found.items()
    }
    return {
      name: size
      for name, size in names.items()
      if _is_inside(name) and not name.endswith(_PART)
    }

  def read(self, name: str) -> bytes | None:
    """Return a file's content; None if there is no such file."""
    with remote.naming(self._url, f"{name} cannot be read"):
      self._files.invalidate_cache()  # s3fs would look into an old listing
      try:
        content: bytes = self._files.cat_file(self._place(name))
      except FileNotFoundError:
        return None
      return content

  def write(self, name: str, content: bytes) -> None:
    """Write a file, which is there whole or as it was before."""
    with remote.naming(self._url, f"{name} cannot be written"):
      self._put(name, lambda place: self._files.pipe_file(place, content))

  def send(self, path: Path, name: str, size: int) -> None:
    """Copy the first `size` bytes of a file of the disk, as `write` does."""

    def stream(place: str) -> None:
      with path.open("rb") as source:
        if size <= _WHOLE:
          self._files.pipe_file(place, source.read(size))
          return
        with self._files.open(place, "wb") as file:
          left = size
          while left and (block := source.read(min(left, _WHOLE))):
            file.write(block)
            left -= len(block)

    with remote.naming(self._url, f"{name} cannot be sent"):
      self._put(name, stream)

  def fetch(self, name: str, path: Path) -> None:
    """Copy a file to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with remote.naming(self._url, f"{name} cannot be fetched"):
      self._files.invalidate_cache()
      self._files.get_file(self._place(name), str(path))

  def remove(self, name: str) -> None:
    """Remove a file, if it is there."""
    with (
      remote.naming(self._url, f"{name} cannot be removed"),
      contextlib.suppress(FileNotFoundError),
    ):
      place = self._place(name)
      self._files.rm_file(place)
      if remote.has_folders(place):
        self._remove_empty(posixpath.dirname(place))

  def _remove_empty(self, place: str) -> None:
    """Remove a folder that is empty, and those above that become so."""
    with contextlib.suppress(OSError, NotImplementedError):
      while place.startswith(f"{self._base}/"):
        self._files.invalidate_cache()
        # Some file systems would remove a full one, too.
        if self._files.ls(place, detail=False):
          return
        self._files.rmdir(place)
        place = posixpath.dirname(place)

  def _place(self, name: str) -> str:
    return posixpath.join(self._base, name)

  def _put(self, name: str, write: Any) -> None:
    place = self._place(name)
    if not remote.has_folders(place):  # an object appears when it is whole
      write(place)
      return
    self._files.makedirs(posixpath.dirname(place), exist_ok=True)
    write(place + _PART)
    self._files.mv(place + _PART, place)


def _holds(outer: Path, inner: Path) -> bool:
  """Return whether a folder is another one or holds it, by whatever path."""
  outer, inner = outer.resolve(), inner.resolve()
  if inner.is_relative_to(outer):
    return True
  return outer.exists() and any(
    path.exists() and path.samefile(outer) for path in (inner, *inner.parents)
  )


def _is_inside(name: str) -> bool:
  """Return whether a path lies in its folder, on every file system."""
  if "\\" in name or "\0" in name or PureWindowsPath(name).drive:
    return False
  return not {"", ".", ".."}.intersection(name.split("/"))
