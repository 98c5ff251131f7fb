"""A bar that shows how a run goes on, if somebody is there to see it."""

from __future__ import annotations

import datetime
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.metrics_file import Row

if TYPE_CHECKING:
  from rich.console import Console
  from rich.progress import Progress as Bar

_WARM_UP_SECONDS = 0.2


class Progress:
  """A bar with round, loss, accuracy, clients per second and time left.

  And with epsilon, if the rows have one.

  A context manager. It draws on the standard error, and nothing at all unless
  that is a terminal which can move its cursor: nothing into files, notebooks
  or `TERM=dumb`. Warnings are printed everywhere.
  """

  def __init__(
    self,
    rounds: int,
    *,
    done: int = 0,
    console: Console | None = None,
  ):
    """Prepare the bar.

    Args:
      rounds: the run's last round.
      done: the round that the run goes on from; 0 if it is new.
      console: where to draw; None is the standard error.
    """
    self._rounds = rounds
    self._done = done
    self._console = console
    self._bar: Bar | None = None
    self._accuracy = "-"
    self._pace = _Pace()

  def __enter__(self) -> Progress:
    console = self._console or stderr()
    if console.is_interactive:
      self._bar = _bar(console)
      self._bar.add_task(
        "",
        total=self._rounds,
        completed=self._done,
        loss="-",
        accuracy="-",
        epsilon="",
        speed="-",
        left="-",
      )
      self._bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def update(self, row: Row, *, clients_per_second: float) -> None:
    """Show a round that is done.

    Args:
      row: the round's metrics.
      clients_per_second: as measured by this process.
    """
    if self._bar is None:
      return
    round_ = int(row["round"])
    if "test/accuracy" in row:
      self._accuracy = formatting.number(row["test/accuracy"])
    self._bar.update(
      self._bar.task_ids[0],
      completed=round_,
      loss=formatting.number(row["train/loss"]) if "train/loss" in row else "-",
      accuracy=self._accuracy,
      epsilon=_epsilon(row),
      speed=formatting.number(clients_per_second),
      left=self._pace.left(round_, self._rounds),
    )

  def log(
    self, message: str, *, level: Literal["info", "warning"] = "info"
  ) -> None:
    """Print a line above the bar; without a bar, only if it is a warning."""
    if self._bar is not None:
      style = "yellow" if level == "warning" else None
      self._bar.console.print(
        message, style=style, markup=False, highlight=False, soft_wrap=True
      )
    elif level == "warning":
      sys.stderr.write(f"{message}\n")
      sys.stderr.flush()


def _epsilon(row: Row) -> str:
  """Return the epsilon of a private run, as "epsilon 1.23  "; "" of others."""
  for key in ("epsilon", "simulated_epsilon"):
    if f"privacy/{key}" in row:
      name = key.replace("_", " ")
      return f"{name} {formatting.number(row[f'privacy/{key}'])}  "
  return ""


class _Pace:
  """The time left, by the rounds of this process alone.

  Rounds come in bursts, one a dispatch, and the first burst includes the
  compilation: the clock starts when it is over.
  """

  def __init__(self) -> None:
    self._first: float | None = None
    self._since = 0.0
    self._from = 0

  def left(self, round_: int, rounds: int) -> str:
    """Return the time from `round_` to `rounds`; '-' while it is unknown."""
    now = time.monotonic()
    if self._first is None:
      self._first = now
    if now - self._first < _WARM_UP_SECONDS:
      self._since, self._from = now, round_
    if round_ == rounds:
      return "0:00:00"
    if round_ == self._from:
      return "-"
    each = (now - self._since) / (round_ - self._from)
    return str(datetime.timedelta(seconds=round(each * (rounds - round_))))


def stderr() -> Console:
  """Return the standard error, interactive if it is a terminal."""
  from rich.console import Console

  # FORCE_COLOR asks for colours in a log file, not for a moving bar.
  terminal = sys.stderr.isatty()
  return Console(stderr=True, force_interactive=None if terminal else False)


def _bar(console: Console) -> Bar:
  from rich import progress

  return progress.Progress(
    progress.SpinnerColumn("line"),  # ASCII: any terminal has it
    progress.TextColumn("round {task.completed}/{task.total}"),
    progress.BarColumn(bar_width=None),
    progress.TextColumn("loss {task.fields[loss]}"),
    progress.TextColumn("accuracy {task.fields[accuracy]}"),
    progress.TextColumn("{task.fields[epsilon]}{task.fields[speed]} clients/s"),
    progress.TextColumn("{task.fields[left]}"),
    console=console,
    expand=True,
    refresh_per_second=4,
    redirect_stdout=sys.stdout.isatty(),  # a redirected output stays apart
  )
