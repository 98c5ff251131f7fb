"""Imports without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def lasting() -> Iterator[None]:
  """Keep what is made meanwhile out of the garbage collector's sight.

  For imports: they make some 500,000 objects that stay, and the collector
  looks through all of them again and again, also later on. Not in a process
  that has imported JAX already: what it has made since, such as the data of an
  earlier run, would never be freed.
  """
  if "jax" in sys.modules:
    yield
    return
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    gc.freeze()
    if was_enabled:
      gc.enable()
