"""What has no public name or type in JAX, in one place.

A release of JAX may move it; `tests/test_jax_internals.py` says so then.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import jax
import numpy as np

# JAX raises errors of a lost process in several types; they share their text.
_LOSS = r"Gloo|NCCL|RCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]oordination"


class KeyValueClient(Protocol):
  """The key-value store that all processes reach, as far as it is used here."""

  def key_value_set(self, key: str, value: str) -> None:
    """Store a value under a key, which can be done once per key."""

  def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
    """Return a value as soon as any process has stored it."""

  def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
    """Return all keys below a key, with their values."""

  def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
    """Return when all processes wait here."""


def key_value_client() -> KeyValueClient:
  """Return the client of JAX's coordination service.

  `jax.distributed` starts the service and keeps the client to itself.

  Raises:
    RuntimeError: this version of JAX keeps it elsewhere, or
      `jax.distributed.initialize` was not called.
  """
  try:
    from jax._src import distributed

    client = distributed.global_state.client
  except (ImportError, AttributeError) as error:
    raise RuntimeError(
      "JAX has no jax._src.distributed.global_state.client any more; find where"
      " jax.distributed keeps its key-value client, and name that here."
    ) from error
  if client is None:
    raise RuntimeError(
      "JAX has no key-value client; call jax.distributed.initialize first."
    )
  return cast(KeyValueClient, client)


def is_timeout(error: BaseException) -> bool:
  """Return whether the key-value client has reached its timeout."""
  known = isinstance(error, jax.errors.JaxRuntimeError)
  return known and "DEADLINE_EXCEEDED" in str(error)


def may_be_loss(error: BaseException) -> bool:
  """Return whether an error may come from the loss of another process."""
  return re.search(_LOSS, str(error)) is not None


def settings_of_thread() -> Callable[
  [], contextlib.AbstractContextManager[None]
]:
  """Return what gives another thread the settings that this one has of JAX.

  `with jax.default_matmul_precision("highest")` and the like hold in one thread
  alone; JAX has a public name for each of them, and none for all.
  """
  from jax._src import config

  x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
  own: list[tuple[Any, Any]] = [
    (state, state.get_local())
    for state in getattr(config, "config_states", {}).values()
  ]
  set_here = [(s, x) for s, x in own if x is not config.config_ext.unset]

  @contextlib.contextmanager
  def alike() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
      stack.enter_context(jax.enable_x64(x64))
      for state, value in set_here:
        stack.enter_context(state(value))
      yield

  return alike


class CompilationCache(Protocol):
  """What JAX asks for compiled programs."""

  def get(self, key: str) -> bytes | None:
    """Return what was put under a key; None if nothing was."""

  def put(self, key: str, value: bytes) -> None:
    """Keep a program under a key."""


def use_cache(cache: CompilationCache) -> bool:
  """Let JAX keep what it compiles in a cache of ours.

  Returns:
    Whether it does; not if it has one already, or keeps it elsewhere.
  """
  from jax._src import compilation_cache

  if getattr(compilation_cache, "_cache_initialized", True):
    return False
  compilation_cache._cache = cache  # type: ignore[assignment]
  compilation_cache._cache_initialized = True
  return True
