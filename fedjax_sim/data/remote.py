"""File systems behind URLs, which fsspec opens.

`gs://` wants gcsfs, `s3://` s3fs, `https://` aiohttp, and so on; their
documentation says how they find credentials.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedjax_sim.core import urls
from fedjax_sim.core.optional import library


def file_system_of(url: str) -> tuple[Any, str]:
  """Return the fsspec file system of a URL, and the URL's path in it.

  Raises:
    ModuleNotFoundError: fsspec, or what it needs for this URL, is missing.
    ValueError: no file system has such URLs.
  """
  core = library("fsspec.core", "bucket", needed_by=urls.redacted_url(url))
  try:
    files, path = core.url_to_fs(url)
  except ImportError as error:  # fsspec says what to install
    raise ModuleNotFoundError(_said(url, str(error))) from error
  except ValueError as error:
    raise ValueError(_said(url, str(error))) from error
  return files, path


def has_folders(path: str) -> bool:
  """Return whether a path's file system has folders; object stores have none.

  Args:
    path: as `file_system_of` returns it.
  """
  return path.startswith("/")


def on_disk(files: Any, path: str) -> Path | None:
  """Return where on the local disk a URL leads; None if elsewhere.

  Args:
    files: as `file_system_of` returns them.
    path: likewise.
  """
  kinds = files.protocol
  kinds = {kinds} if isinstance(kinds, str) else set(kinds)
  return Path(path) if kinds & {"file", "local"} else None


@contextlib.contextmanager
def naming(url: str, what: str) -> Iterator[None]:
  """Make errors name what failed, whatever a bucket's library raises.

  Args:
    url: where it failed.
    what: what failed, such as "x.npy cannot be copied".

  Raises:
    FileNotFoundError, OSError: one line without passwords, instead of what was
      raised.
  """
  try:
    yield
  except Exception as error:
    why = " ".join(str(error).split()) or type(error).__name__
    missing = isinstance(error, FileNotFoundError)
    raise (FileNotFoundError if missing else OSError)(
      _said(url, f"{what}: {why}")
    ) from error


def _said(url: str, text: str) -> str:
  """Return what happened at a URL, without passwords.

  Args:
    url: where.
    text: may name it, too.
  """
  name = urls.redacted_url(url)
  return urls.redacted(f"{name}: {text.replace(url, name)}")
