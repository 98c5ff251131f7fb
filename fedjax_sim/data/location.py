"""Where a user's data lies: `data.path` or the variable FEDJAX_SIM_DATA."""

from __future__ import annotations

import os
from pathlib import Path

from fedjax_sim.core import urls

VARIABLE = "FEDJAX_SIM_DATA"


def is_url(path: str | os.PathLike[str]) -> bool:
  """Return whether a path is a URL, not a path of the local disk."""
  return "://" in os.fspath(path)


def local(path: str | os.PathLike[str]) -> Path:
  """Return a path of the local disk as a `Path`.

  Raises:
    ValueError: it is a URL.
  """
  if is_url(path):
    name = urls.redacted_url(os.fspath(path))
    raise ValueError(
      f"{name} is not on this machine's disk; copy it first, a store by"
      f" fedjax-sim data copy --store={name} --to=DIR."
    )
  return Path(path)


def workdir_on_disk(path: str | os.PathLike[str], name: str) -> Path:
  """Return the workdir of a run as a `Path`, for what only reads it there.

  Args:
    path: of the workdir.
    name: what messages call it, such as "--workdir".

  Raises:
    ValueError: it is a URL.
  """
  if is_url(path):
    raise ValueError(
      f"{name}={urls.redacted_url(os.fspath(path))} is a URL, which only run"
      " takes; copy the workdir to a folder first."
    )
  return Path(path)


def locate(
  path: str | os.PathLike[str] | None, field: str = "data.path"
) -> Path:
  """Return the file or folder that a loader reads.

  Args:
    path: absolute, or relative to the working folder or else to the folder
      that FEDJAX_SIM_DATA names; None: that folder (or file) itself.
    field: what messages call it.

  Raises:
    FileNotFoundError: nothing is there; names the paths that were tried.
    ValueError: neither `path` nor FEDJAX_SIM_DATA is set, or the path is a URL.
  """
  root = os.environ.get(VARIABLE)
  if path is None and not root:
    raise ValueError(
      f"{field} is not set; give the data's path, or set {VARIABLE}."
    )
  tried = []
  if path is not None:
    tried.append((field, local(path).expanduser()))
  if root:
    base = Path(root).expanduser()
    tried.append((VARIABLE, base if path is None else base / path))
  for _, place in tried:
    if place.exists():
      return place
  places = " and ".join(f"{place} (from {field})" for field, place in tried)
  raise FileNotFoundError(
    f"There is no {urls.redacted(places)}; correct {field} or {VARIABLE}."
  )


def find(folder: Path, *names: str) -> Path:
  """Return the first of these files that `folder` holds.

  Raises:
    FileNotFoundError: it holds none; names the files.
  """
  for name in names:
    if (folder / name).is_file():
      return folder / name
  raise FileNotFoundError(
    f"{folder} holds no {' or '.join(names)}; put it there, or correct"
    " data.path. docs/data.md says where to get it."
  )
