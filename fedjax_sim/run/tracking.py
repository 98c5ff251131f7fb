"""What a run writes and shows while it goes: metrics, timings, progress.

With several processes only the first one writes; the others keep silent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedjax_sim import reporting
from fedjax_sim.distributed import processes
from fedjax_sim.run.trackers import Trackers
from fedjax_sim.simulation.dispatch import Columns, DispatchResult, Row


class Journal:
  """The silent journal, and what every journal can do."""

  def log(self, message: str, level: str = "info") -> None:
    """Log a message beside the metrics."""

  def begin(self, row: Row) -> None:
    """Write the row of an evaluation before the first round."""

  def write(self, done: int, out: DispatchResult, eval_seconds: float) -> None:
    """Write the rows of a dispatch.

    Args:
      done: rounds done with it.
      out: the dispatch.
      eval_seconds: what the evaluation after it took.
    """

  def sync(self) -> None:
    """Return when all that was written is on the disk."""

  def commit(self, done: int) -> None:
    """Let trackers send rows: a checkpoint holds those of `done` rounds."""


class _Written(Journal):
  def __init__(
    self,
    metrics: Any,
    timings: Any,
    trackers: Trackers,
    progress: Any,
    clients: reporting.ClientRounds | None,
    name_of: Callable[[int], str],
  ):
    self._metrics, self._timings = metrics, timings
    self._trackers, self._progress = trackers, progress
    self._clients, self._name_of = clients, name_of

  def log(self, message: str, level: str = "info") -> None:
    self._progress.log(message, level=level)

  def begin(self, row: Row) -> None:
    self._metrics.append([row])
    self._trackers.write([row])

  def write(self, done: int, out: DispatchResult, eval_seconds: float) -> None:
    self._metrics.append(out.rows)
    self._trackers.write(out.rows)
    if out.rows:
      self._timings.append([_timing(done, out, eval_seconds)])
      if self._clients is not None:
        self._clients.append(done, self._named(out.client_log))
    for message in self._trackers.messages():
      self.log(message, level="warning")
    rate = out.clients / max(out.seconds, 1e-9)
    for row in out.rows:
      self._progress.update(row, clients_per_second=rate)

  def _named(self, log: Columns) -> dict[str, Any]:
    """Return the lines of clients, with their names beside their indices."""
    found: dict[str, Any] = {}
    for column, values in log.items():
      found[column] = values
      if column == "client":
        found["name"] = [self._name_of(i) for i in values.tolist()]
    return found

  def sync(self) -> None:
    self._metrics.sync()
    self._timings.sync()
    self._trackers.flush()
    if self._clients is not None:
      self._clients.sync()

  def commit(self, done: int) -> None:
    self._trackers.commit(done)


def _timing(done: int, out: DispatchResult, eval_seconds: float) -> Row:
  sent = {} if out.sent_bytes is None else {"sent_bytes": out.sent_bytes}
  return {
    "round": done,
    "rounds": len(out.rows),
    "train_seconds": out.seconds,
    "plan_seconds": out.plan_seconds,
    "eval_seconds": eval_seconds,
    **sent,
  }


@contextlib.contextmanager
def journal(
  folder: Path,
  *,
  rounds: int,
  done: int,
  trackers: Trackers,
  begins: bool = False,
  log_clients: bool = False,
  name_of: Callable[[int], str] = str,
) -> Iterator[Journal]:
  """Yield the journal of a run.

  Args:
    folder: the workdir.
    rounds: that the run will have.
    done: that it has; what the files say of later ones is cut off.
    trackers: where metrics are sent to.
    begins: whether there is a row of round 0 to write.
    log_clients: whether there are lines of clients to write.
    name_of: a client's index -> its name.
  """
  if not processes.is_first():
    yield Journal()
    return
  with (
    reporting.MetricsFile(
      folder / "metrics.jsonl", keep_through=done
    ) as metrics,
    reporting.MetricsFile(
      folder / "timings.jsonl", keep_through=done, complete=False
    ) as timings,
    reporting.Progress(rounds, done=done) as progress,
    contextlib.ExitStack() as stack,
  ):
    clients = None
    if log_clients:
      clients = reporting.ClientRounds(
        folder / "client_rounds",
        folder / "client_rounds.parquet",
        keep_through=done,
      )
      stack.enter_context(contextlib.closing(clients))
    if done:
      trackers.commit(done)  # what another process has not sent
    yield _Written(metrics, timings, trackers, progress, clients, name_of)
