"""How commands that compute begin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

NO_CACHE = "--no-compilation-cache"
_ENABLE = "JAX_ENABLE_COMPILATION_CACHE"


def prepare(*, named: bool = False) -> None:
  """Prepare JAX: its CPU devices, and the cache of compiled programs.

  Args:
    named: whether programs must have the names of their operations, for a
      trace; others are the same programs without them.
  """
  import jax

  from fedjax_sim import distributed
  from fedjax_sim.distributed import compilation_cache

  distributed.setup()
  if os.environ.get(_ENABLE) != "false":
    compilation_cache.begin()
  if named:
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


@contextlib.contextmanager
def without_cache(arguments: Sequence[str]) -> Iterator[list[str]]:
  """Yield a command's arguments without --no-compilation-cache, and obey it.

  JAX, which is imported later, finds it in the environment, and so do the
  processes that are started.

  Raises:
    UsageError: it has a value.
  """
  for argument in arguments:
    name, equals, _ = argument.partition("=")
    if equals and name == NO_CACHE:
      from fedjax_sim.config.flags import UsageError

      raise UsageError(f"{argument}: it takes no value. Give {NO_CACHE} alone.")
  rest = [a for a in arguments if a != NO_CACHE]
  before = os.environ.get(_ENABLE)
  if len(rest) < len(arguments):
    os.environ[_ENABLE] = "false"
  try:
    yield rest
  finally:
    if before is None:
      os.environ.pop(_ENABLE, None)
    else:
      os.environ[_ENABLE] = before
