"""Deliver the rows of a run to a tracker, whatever becomes of the tracker.

A thread of its own calls each tracker, so none can stop or slow the run. What
waits to be sent needs no memory: the rows are in `metrics.jsonl`, and the run
only says through which round they are committed to a checkpoint. What is sent
is noted in `trackers.json`.

Every row arrives exactly once. A process that was killed may have sent rows
that it did not note, so after a run is joined, and after a request that failed,
the tracker is asked for the rows that it lacks before any is sent again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedjax_sim import reporting
from fedjax_sim.config.build import ConfiguredTracker
from fedjax_sim.core import urls
from fedjax_sim.core.errors import one_line
from fedjax_sim.reporting.trackers import Row, RunFacts, Status

MOST_ROWS = 100  # of a batch
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds after a failure


class Delivery:
  """Sends the committed rows of a run to one tracker.

  Args:
    configured: the tracker, and what it gets.
    metrics: `metrics.jsonl`; it only grows while this object lives.
    facts: makes what the tracker learns of the run; called by the thread.
    note: writes what is to be kept: the run's id, the round through which rows
      are sent, and how the run ended.
    warn: takes a message to the user; called by the thread.
    sent: the round through which rows were sent before; -1: none.
  """

  def __init__(
    self,
    configured: ConfiguredTracker,
    metrics: Path,
    facts: Callable[[], RunFacts],
    note: Callable[[dict[str, Any]], None],
    warn: Callable[[str], None],
    sent: int = -1,
  ):
    self._label, self._tracker, self._select, self._wait = configured
    self._reader = reporting.MetricsReader(metrics)
    self._facts, self._note, self._warn = facts, note, warn
    self._changed = threading.Condition()
    self._committed = -1  # a round
    self._end: tuple[Status, Sequence[Path]] | None = None
    self._deadline = float("inf")
    # Of the thread alone; others read them when it is over, or has no time.
    self._opened = False
    self._sent, self._newest = sent, -1  # rounds, see `Opened`
    self._error = ""
    self._ended = False
    self._thread = threading.Thread(
      target=self._work, name=f"tracker {self._label}", daemon=True
    )

  def commit(self, round_: int) -> None:
    """Let rows through this round be sent; start with the first call."""
    with self._changed:
      # A row of round 0 is written after the checkpoint of round 0.
      self._committed = round_ or -1
      self._changed.notify()
    if not self._thread.ident:
      self._thread.start()

  def end(self, status: Status, files: Sequence[Path]) -> None:
    """Let the tracker end the run when all is sent; return at once."""
    with self._changed:
      self._end = status, files
      self._deadline = time.monotonic() + self._wait
      self._changed.notify()

  def join(self) -> str:
    """Wait until all is sent, or time is over; return what was not sent."""
    if not self._thread.ident:
      return ""  # the run ended before its first checkpoint
    self._thread.join(max(0.0, self._deadline - time.monotonic()))
    if self._ended:
      return ""
    rounds = [
      int(row["round"]) for row in self._reader.read(-1, self._committed)
    ]
    total, missing = len(rounds), sum(r > self._sent for r in rounds)
    why = self._error or f"it took longer than {self._wait:g} s"
    if missing:
      return (
        f"{self._label}: {missing} of {total} rows were not sent: {why}; they"
        " are in metrics.jsonl."
      )
    return f"{self._label}: all rows were sent, but not the end: {why}."

  def _work(self) -> None:
    """Do what there is to do, until the run ends."""
    pause = 0.0
    while self._await_work(pause):
      try:
        self._step()
        pause, self._error = 0.0, ""
      except Exception as error:  # whatever a client raises
        if not (self._error or self._end):
          self._warn(
            f"{self._label}: {_short(error)}; the run goes on, and its rows"
            " wait in metrics.jsonl."
          )
        self._error = _short(error)
        if self._end and not self._opened:
          return  # it cannot be reached
        longest = _FIRST_PAUSE if self._end else _LONGEST_PAUSE
        pause = min(max(_FIRST_PAUSE, 2 * pause), longest)

  def _await_work(self, pause: float) -> bool:
    """Wait for work, and after a failure; return whether to go on."""
    with self._changed:
      if pause:
        ends = self._end is not None
        self._changed.wait_for(lambda: ends < (self._end is not None), pause)
      self._changed.wait_for(
        lambda: not self._opened or self._sent < self._committed or self._end
      )
      return not self._ended and time.monotonic() < self._deadline

  def _step(self) -> None:
    """Open the run, or send a batch, or end the run."""
    if not self._opened:
      facts = self._facts()
      opened = self._tracker.open(facts)
      self._sent, self._newest = opened.sent, opened.newest
      begun = {"run_id": opened.run_id, "sent": opened.sent, "ended": None}
      self._note(begun)
      self._opened = True
      if opened.warning:
        self._warn(f"{self._label}: {opened.warning}")
    elif self._sent < self._committed:
      self._send_batch()
    elif self._end is not None:
      status, files = self._end
      self._tracker.close(status, files)
      self._note({"ended": status})
      self._ended = True

  def _send_batch(self) -> None:
    rows = self._reader.read(self._sent, self._committed, MOST_ROWS)
    last = int(rows[-1]["round"]) if rows else self._committed
    selected: list[Row] = [self._select(row) for row in rows]
    if rows and int(rows[0]["round"]) <= self._newest:
      selected = self._tracker.unsent(selected)
    selected = [row for row in selected if len(row) > 1]
    self._newest = max(self._newest, last)  # if the request fails
    if selected:
      self._tracker.send(selected)
    self._sent = last
    self._note({"sent": last})


def _short(error: BaseException) -> str:
  """Return an error on one line, at most 200 characters, without passwords."""
  text = urls.redacted(one_line(error)) or type(error).__name__
  return text if len(text) <= 200 else f"{text[:200]}..."
