"""Write files atomically: a killed process leaves the old file or the new."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What a file system answers that does not know what it is asked for.
UNSUPPORTED = (
  errno.EINVAL,
  errno.ENOLCK,
  errno.ENOSYS,
  errno.ENOTSUP,
  errno.EOPNOTSUPP,
)

PathLike = str | os.PathLike[str]


def write_atomically(path: PathLike, data: bytes) -> None:
  """Replace the content of `path` by `data`, as `replace_atomically` does.

  Raises:
    OSError: see `replace_atomically`.
  """
  replace_atomically(path, lambda temporary: _write(temporary, data))


def _write(path: Path, data: bytes) -> None:
  with path.open("wb") as file:
    file.write(data)


def replace_atomically(path: PathLike, write: Callable[[Path], None]) -> None:
  """Replace the content of `path`; readers see the old content or the new.

  The new content is written to a hidden file in the same folder, synced to
  disk, and renamed. A process killed in between leaves the old content, and the
  hidden file, which the next write reuses.

  Args:
    path: the file; its folder must exist.
    write: writes the whole content to the path that it receives.

  Raises:
    OSError: the folder is missing or not writable, or the disk is full.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    write(temporary)
    with temporary.open("rb+") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
  except BaseException as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    if not isinstance(error, OSError):
      raise
    raise OSError(
      error.errno,
      f"cannot write {path}: {error.strerror}; give an existing, writable"
      " folder with space left",
    ) from error


def sync_folder(folder: Path) -> None:
  """Sync a rename in `folder` to disk, where the system supports it."""
  if os.name != "posix":
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def plain(value: Any) -> Any:
  """Return `value` as JSON can represent it.

  Numpy scalars become Python numbers. NaN and infinities become None.
  """
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if isinstance(value, bool):
    return value
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real):
    return float(value) if math.isfinite(value) else None
  return value


def write_json(path: PathLike, value: Any) -> None:
  """Write `value` as indented JSON, in the order given.

  Raises:
    OSError: see `write_atomically`.
    TypeError: `value` cannot be represented in JSON.
  """
  text = json.dumps(plain(value), indent=2, allow_nan=False)
  write_atomically(path, f"{text}\n".encode())
