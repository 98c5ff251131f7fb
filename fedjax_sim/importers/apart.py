"""A file is read in a process of its own, which may loop or crash.

libhdf5 does so with some damaged files, in C, where nothing can stop it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fedjax_sim.importers.blocks import Block

LIMIT = 300.0  # seconds of the processor for one block: gigabytes, if packed
_CHILD = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from fedjax_sim.importers import apart
apart.serve()
"""


def apart(
  file: Path, kind: str, read: Callable[[Path], Iterator[Block]]
) -> Iterator[Block]:
  """The blocks of a file, as another process reads them.

  Args:
    file: what is read.
    kind: what it should be, for messages.
    read: what reads it; can be pickled.

  Raises:
    MemoryError: the process was killed.
    RuntimeError: the process failed for a reason that is not the file.
    ValueError: the process crashed, or computed for `LIMIT` seconds without a
      block; names file and the last client before.
    Exception: what `read` raises.
  """
  process = subprocess.Popen(
    [sys.executable, "-c", _CHILD],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  assert process.stdin
  assert process.stdout
  place = "before its first client"
  try:
    with process.stdin as to:
      pickle.dump(sys.path, to)
      pickle.dump((LIMIT, read, file), to)
    while True:
      try:
        found = pickle.load(process.stdout)
      except (EOFError, pickle.UnpicklingError):
        raise _ended(process.wait(), file, kind, place) from None
      if found is None:
        return
      if isinstance(found, Exception):
        raise found
      yield found
      place = f"after client {found.names[-1]!r}"
  finally:
    process.kill()
    process.stdout.close()
    process.wait()


def _ended(code: int, file: Path, kind: str, place: str) -> Exception:
  """What to raise as a process ended without its last word."""
  if code >= 0:
    return RuntimeError(
      f"{file}: the process that reads it ended with exit status {code}; its"
      " error is above."
    )
  if code == -signal.SIGKILL:
    return MemoryError(
      f"{file}: {place} the process that reads it was killed, perhaps as memory"
      " ran out; split its largest client, or use a machine with more."
    )
  how = f"crashed with {signal.Signals(-code).name}"
  if code == -signal.SIGPROF:
    how = f"did not end within {LIMIT:g} s of computing"
  return ValueError(
    f"{file} cannot be read as {kind}: {place} the library {how}. The file is"
    " damaged; get it again."
  )


def serve() -> None:
  """The other process: blocks go to standard output, then None or an error."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
  to = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # whatever a library prints
  limit, read, file = pickle.load(sys.stdin.buffer)
  try:
    signal.setitimer(signal.ITIMER_PROF, limit)
    for block in read(file):
      pickle.dump(block, to, pickle.HIGHEST_PROTOCOL)
      to.flush()
      signal.setitimer(signal.ITIMER_PROF, limit)
    last = None
  except Exception as error:
    last = error
  pickle.dump(last, to)
  to.close()
