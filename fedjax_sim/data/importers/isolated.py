"""Files are read in a process of their own, which may loop or crash.

libhdf5 does so with some damaged files, in C, where nothing can stop it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedjax_sim.data.importers.blocks import Block

LIMIT = 300.0  # seconds of the processor for one block, at most
_CRASHES = {
  signal.SIGABRT,
  signal.SIGBUS,
  signal.SIGFPE,
  signal.SIGILL,
  signal.SIGPROF,
  signal.SIGSEGV,
}
_CHILD = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from fedjax_sim.data.importers import isolated
isolated.serve(int(sys.argv[1]))
"""
_FILE, _BLOCK, _WARNING, _ERROR, _END = range(5)  # what the other process sends


def apart(
  files: Sequence[Path], kind: str, read: Callable[[Path], Iterator[Block]]
) -> Iterator[Block]:
  """Yield the blocks of some files, which another process reads.

  Args:
    files: the files, read one after the other.
    kind: the format that they should have, for messages.
    read: the function that reads a file; it can be pickled.

  Raises:
    MemoryError: the process was killed.
    ChildProcessError: it ended for a reason that is not the file.
    ValueError: it crashed, or read no block in 30 seconds of computing, plus
      one for every megabyte of the file, `LIMIT` at most; names the file and
      the last client before.
    Exception: what `read` raises; where it was is in its notes.
  """
  receives, sends = os.pipe()
  with open(receives, "rb") as stream:
    try:
      # -P: a pickle.py in the working folder is none of ours.
      process = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD, str(sends)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[sends],
        process_group=0,  # Ctrl-C is for this process, which ends the other
      )
    finally:
      os.close(sends)
    try:
      _order(process, (read, [(file, _limit(file)) for file in files]))
      yield from _received(stream, process, files[0], kind)
    finally:
      process.kill()
      process.wait()


def _order(process: subprocess.Popen[bytes], call: Any) -> None:
  assert process.stdin
  try:
    with process.stdin as to:
      pickle.dump(sys.path, to)
      pickle.dump(call, to)
  except BrokenPipeError:
    pass  # it has ended, and how is asked for next


def _received(
  stream: Any, process: subprocess.Popen[bytes], file: Path, kind: str
) -> Iterator[Block]:
  place = "before its first client"
  while True:
    try:
      what, value = pickle.load(stream)
    except (EOFError, pickle.UnpicklingError):
      raise _ended(process.wait(), file, kind, place) from None
    if what == _FILE:
      file, place = value, "before its first client"
    elif what == _BLOCK:
      yield value
      place = f"after client {value.names[-1]!r}"
    elif what == _WARNING:
      warnings.warn(value, stacklevel=2)
    elif what == _ERROR:
      raise value
    else:
      return


def _limit(file: Path) -> float:
  """Return the seconds of computing that one block of a file may take."""
  size = file.stat().st_size if file.exists() else 0
  return min(LIMIT, 30 + size / 1e6)


def _ended(code: int, file: Path, kind: str, place: str) -> Exception:
  """Return the error for a process that ended before it reported its end."""
  if code == -signal.SIGKILL:
    return MemoryError(
      f"{file}: {place} the process that reads it was killed, perhaps as memory"
      " ran out; split its largest client, or use a machine with more."
    )
  if -code not in _CRASHES:
    how = f"exit status {code}" if code >= 0 else f"signal {-code}"
    return ChildProcessError(
      f"{file}: {place} the process that reads it ended with {how}; what it"
      " said is above."
    )
  how = f"crashed with {signal.Signals(-code).name}"
  if code == -signal.SIGPROF:
    how = f"did not end within {_limit(file):.3g} s of computing"
  return ValueError(
    f"{file} cannot be read as {kind}: {place} the library {how}. The file is"
    " damaged; get it again."
  )


def serve(descriptor: int) -> None:
  """Read the files in the other process, and write their blocks to a pipe.

  Args:
    descriptor: the pipe's end into which it writes.
  """
  for number in (signal.SIGPROF, signal.SIGPIPE):  # it may have been ignored
    signal.signal(number, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
  read, files = pickle.load(sys.stdin.buffer)
  with open(descriptor, "wb") as to:

    def send(limit: float, what: int, value: Any = None) -> None:
      pickle.dump((what, value), to, pickle.HIGHEST_PROTOCOL)
      to.flush()
      signal.setitimer(signal.ITIMER_PROF, limit)

    try:
      with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for file, limit in files:
          send(limit, _FILE, file)
          for block in read(file):
            send(limit, _BLOCK, block)
          for warning in said:
            send(limit, _WARNING, str(warning.message))
          said.clear()
    except Exception as error:
      send(0, _ERROR, _can_travel(error))
    else:
      send(0, _END)


def _can_travel(error: Exception) -> Exception:
  """Return the error, or one that can be pickled, with its traceback noted."""
  text = "".join(traceback.format_exception(error))
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:
    error = RuntimeError(f"{type(error).__name__}: {error}")
  error.add_note(text)
  return error
