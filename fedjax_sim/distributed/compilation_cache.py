"""Compiled programs on the disk, where the next process finds them.

JAX has such a cache, and asks this one in its place. A damaged program could
compute something else without a word, and so could one under another's name, so
each has a checksum of both; machines that share a folder have programs of their
own; and what was used the longest ago is forgotten first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import jax

from fedjax_sim.distributed import cpu, jax_internals

MOST_BYTES = 2**30
_SUM_BYTES = hashlib.sha256().digest_size
_SPARE = 16  # what part of the room is made, or taken, at a time


class ProgramFiles:
  """A folder of compiled programs, as JAX asks for them.

  Whatever is wrong with it costs one line, never a run.

  Args:
    folder: made if it is missing, for the user alone.
    most_bytes: what all programs may take.
    say: gets the line.

  Raises:
    OSError: the folder cannot be made, or others can write to it.
  """

  def __init__(
    self,
    folder: Path,
    most_bytes: int = MOST_BYTES,
    say: Callable[[str], None] = warnings.warn,
  ):
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_trusted(folder)
    self._path = folder  # as JAX calls it
    self._most_bytes, self._say = most_bytes, say
    self._machine = machine()
    self._lock = threading.Lock()
    self._said = False
    self._room = 0  # bytes to write before the folder is looked through

  def get(self, key: str) -> bytes | None:
    """Return a program; None if there is none, or it is damaged."""
    path = self._file(key)
    try:
      with path.open("rb") as file:
        owner, content = os.fstat(file.fileno()).st_uid, file.read()
    except FileNotFoundError:
      return None
    except OSError as error:
      self._trouble(f"cannot be read ({error})")
      return None
    if os.name == "posix" and owner != os.geteuid():
      self._trouble(f"has a program that somebody else wrote: {path}")
      return None
    with contextlib.suppress(OSError):  # of a folder that can only be read
      os.utime(path)  # forgotten last
    expected, program = content[:_SUM_BYTES], content[_SUM_BYTES:]
    if _checksum(path, program) == expected:
      return program
    with contextlib.suppress(OSError):
      path.unlink()
    self._trouble(f"was damaged: {path} is removed, and compiled anew")
    return None

  def put(self, key: str, value: bytes) -> None:
    """Keep a program, unless it is larger than all may be."""
    path = self._file(key)
    content = _checksum(path, value) + value
    if len(content) > self._most_bytes:
      return
    try:
      self._write(path, content)
      with self._lock:
        self._room -= len(content)
        full = self._room < 0
      if full:
        self._forget_oldest()
    except OSError as error:
      self._trouble(f"cannot be written ({error})")

  def _write(self, path: Path, content: bytes) -> None:
    # A name of its own: other processes may write the same program.
    with tempfile.NamedTemporaryFile(
      dir=self._path, prefix=".", delete=False
    ) as file:
      try:
        file.write(content)
        file.close()
        os.replace(file.name, path)
      except BaseException:
        with contextlib.suppress(OSError):
          os.unlink(file.name)
        raise

  def _file(self, key: str) -> Path:
    return self._path / f"{self._machine}-{key}"

  def _forget_oldest(self) -> None:
    """Delete what was used the longest ago, until there is room.

    Room for a while: looking through thousands of programs whenever one is
    written would take longer than compiling small ones.
    """
    found = []
    for entry in os.scandir(self._path):
      with contextlib.suppress(FileNotFoundError):  # another process did
        info = entry.stat()
        found.append((info.st_mtime, info.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    wanted = self._most_bytes
    if total > wanted:
      wanted -= wanted // _SPARE
    for _, size, path in sorted(found):
      if total <= wanted:
        break
      Path(path).unlink(missing_ok=True)
      total -= size
    # A part of it: other processes write, too.
    with self._lock:
      self._room = (self._most_bytes - total) // _SPARE

  def _trouble(self, what: str) -> None:
    with self._lock:
      first, self._said = not self._said, True
    if first:
      self._say(
        f"the compilation cache {what}; the run goes on."
        " --no-compilation-cache does without it."
      )


def _check_trusted(folder: Path) -> None:
  """Refuse a folder into which somebody else may put code for this process."""
  if os.name != "posix":
    return
  info = folder.stat()
  if info.st_uid != os.geteuid() or info.st_mode & 0o022:
    raise OSError(
      f"others can write to {folder}, and so could have their code run here;"
      " remove it, or let it be yours alone (chmod go-w)"
    )


def _checksum(path: Path, program: bytes) -> bytes:
  return hashlib.sha256(path.name.encode() + b"/" + program).digest()


def machine() -> str:
  """Return a digest of what code is compiled for beyond what JAX looks at.

  The processor's instructions and the number of cores: clusters share home
  folders, and code of another processor may end a process. XLA takes NPROC for
  the number of cores, and JAX compresses by what its version of Python has.
  """
  facts = [platform.machine(), platform.processor(), str(cpu.count())]
  facts += [os.environ.get("NPROC", ""), str(sys.version_info[:2])]
  with contextlib.suppress(OSError):  # Linux
    text = Path("/proc/cpuinfo").read_text()
    named = r"^(?:model name|flags|Features)\s*:(.*)$"
    facts += sorted(set(re.findall(named, text, re.MULTILINE)))
  return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def folder_of_user() -> Path:
  """Return the folder of this user's compiled programs."""
  cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  return cache / "fedjax_sim" / "programs"


def begin() -> None:
  """Keep from now on what JAX compiles, and find what it compiled before.

  Nothing is done where JAX has a cache already (`JAX_COMPILATION_CACHE_DIR`)
  or shall have none (`JAX_ENABLE_COMPILATION_CACHE=0`).
  """
  settings = jax.config.values
  here = settings["jax_compilation_cache_dir"]
  if here or not settings["jax_enable_compilation_cache"]:
    return
  most = settings["jax_compilation_cache_max_size"]
  try:
    files = ProgramFiles(folder_of_user(), MOST_BYTES if most < 0 else most)
  except (OSError, RuntimeError) as error:  # no home
    warnings.warn(
      f"no compilation cache: {error}. Set XDG_CACHE_HOME to a folder that you"
      " can write, or give --no-compilation-cache.",
      stacklevel=2,
    )
    return
  if jax_internals.use_cache(files):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
