"""Where a run's time goes: seconds of each phase, as the host sees them.

    phases = Phases()
    with phases("train"):
      ...

The object is passed on, there is no global one. A phase inside another takes
its time from it, so that phases add up to no more than the time that passed.
Each is named in a profiler's trace, too; without one that costs next to
nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

MEANING: Mapping[str, str] = {
  "build": "data, model, first state",
  "lanes": "lanes tried out, what more than one compiles included",
  "compile": "the round's program",
  "plan": "waiting for a plan; what overlaps with training is not counted",
  "train": "calls of the compiled round; the first sends the examples, too",
  "evaluate": "evaluations; the first one compiles its programs",
  "write": "metrics, timings, events, curves; loading what writes them",
  "checkpoint": "reading and writing checkpoints",
  "profile": "starting, ending and writing a trace",
  "other": "the rest",
}


class Phases:
  """Adds up seconds by phase; for one thread.

  Attributes:
    began: when it was made, by the clock.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    """Begin to measure.

    Args:
      clock: gives the time in seconds.
    """
    self._clock = clock
    self._seconds: dict[str, float] = {}
    self._open: list[str] = []
    self.began = self._since = clock()

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    """Count the time inside as that of phase `name`, a key of `MEANING`."""
    assert name in MEANING, name
    self._charge()
    self._open.append(name)
    try:
      with jax.profiler.TraceAnnotation(f"phase: {name}"):
        yield
    finally:
      self._charge()
      self._open.pop()

  def _charge(self) -> None:
    """Add the time since the last change to the innermost phase."""
    now = self._clock()
    name = self._open[-1] if self._open else "other"
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
    self._since = now

  def seconds(self) -> dict[str, float]:
    """Return each phase's seconds until now; they add up to all that passed."""
    self._charge()
    return {name: self._seconds.get(name, 0.0) for name in MEANING}
