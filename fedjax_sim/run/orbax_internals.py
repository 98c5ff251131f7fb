"""What has no public name in orbax, in one place.

A release of orbax may move it; `tests/test_pieces.py` says so then.
"""

from __future__ import annotations

import itertools

_SAVES = 2**40  # more than a process ever makes


def separate_saves(process: int) -> None:
  """Let processes save at the same time, each something of its own.

  Orbax numbers the saves of a process, and under this number its threads tell
  each other which folders are made, in a store that all processes share: it
  takes saves of one number for parts of the same. So each process gets numbers
  of its own.

  Args:
    process: which one this is, from 0.

  Raises:
    RuntimeError: this version of orbax keeps the numbers elsewhere.
  """
  try:
    from orbax.checkpoint._src.futures import synchronization

    numbers = synchronization.OperationIdGenerator
    _ = numbers._operation_id_counter
  except (ImportError, AttributeError) as error:
    raise RuntimeError(
      "This version of orbax-checkpoint cannot save in pieces; install 0.12.8,"
      " with which it was tried."
    ) from error
  first = (process + 1) * _SAVES
  numbers._operation_id_counter = itertools.count(first)
