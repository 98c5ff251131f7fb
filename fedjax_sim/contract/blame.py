"""Where in a user's file an error was raised, and what mends it."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax

from fedjax_sim.core import errors

# The first that fits. A traced number has no value while a round is compiled.
_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
  (
    jax.errors.TracerBoolConversionError,
    "Python branches on a traced number, which has no value while the round is"
    " compiled; write jnp.where(condition, a, b), or jax.lax.cond",
  ),
  (
    jax.errors.TracerArrayConversionError,
    "numpy wants the value of a traced number, which has none while the round"
    " is compiled; take jax.numpy",
  ),
  (
    jax.errors.TracerIntegerConversionError,
    "Python wants the value of a traced number, as an index or a length; use"
    " jnp.take or jax.lax.fori_loop",
  ),
  (
    jax.errors.ConcretizationTypeError,
    "Python wants the value of a traced number, as float(x), int(x) or range(x)"
    " do; keep it an array",
  ),
  (
    jax.errors.NonConcreteBooleanIndexError,
    "a mask that is traced leaves a number of rows that is not known; write"
    " jnp.where(mask, x, 0)",
  ),
  (
    jax.errors.UnexpectedTracerError,
    "a traced number was kept outside of the function, in a global or an"
    " attribute; return it, as a part of the state",
  ),
)


def needs_a_value(error: BaseException) -> bool:
  """Return whether Python asked for the value of a traced number."""
  kinds = tuple(kind for kind, _ in _REMEDIES)
  return any(isinstance(each, kinds) for each in _chain(error))


def blamed(error: BaseException, file: str | None) -> str:
  """Return what went wrong, at which line of the user's file, and the remedy.

  Args:
    error: what was raised.
    file: the user's file; None: not known.
  """
  chain = list(_chain(error))
  root = next((e for e in chain if _remedy(e)), chain[-1])
  if remedy := _remedy(root):
    what = f"{type(root).__name__}: {remedy}"
  else:
    text = errors.one_line(root)
    what = f"{type(root).__name__}: {text[:400]}"
  notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
  return f"{where(error, file)}{what}{notes}"


def where(error: BaseException, file: str | None) -> str:
  """Return "FILE, line N, `code`: ", the innermost; "" if it is not there."""
  for each in reversed(list(_chain(error))):
    for frame in reversed(traceback.extract_tb(each.__traceback__)):
      if file is not None and frame.filename == file:
        code = linecache.getline(file, frame.lineno or 0).strip()
        shown = f", `{code}`" if code else ""
        return f"{Path(file).name}, line {frame.lineno}{shown}: "
  return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
  """Yield an error and those that caused it, the outermost first."""
  seen: set[int] = set()
  now: BaseException | None = error
  while now is not None and id(now) not in seen:
    seen.add(id(now))
    yield now
    now = now.__cause__ or (
      None if now.__suppress_context__ else now.__context__
    )


def _remedy(error: BaseException) -> str:
  for kind, remedy in _REMEDIES:
    if isinstance(error, kind):
      return remedy
  return ""
