"""What a tracker is: open a run, send rows of metrics, close the run.

Rows are numbered by their rounds, and each has to arrive exactly once, however
often the run was killed and in whatever moment. So `open` reports what the
server already has, and `unsent` is asked about every row that may have arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

Row = Mapping[str, float]  # "round" (a whole number) and metrics by name
Status = Literal["finished", "failed", "killed"]


class RunFacts(NamedTuple):
  """What a tracker learns of a run.

  Attributes:
    name: of the run, for people.
    folder: the workdir.
    key: a name that no other run has; it stays the same when the run resumes.
    run_id: what `open` returned before; "" if the run was never opened.
    sent: the round through which rows are known to be sent; -1: none.
    first_round: the first round that this process trains.
    params: "section.field" -> value, the complete config.
    tags: versions of the software, and the git commit if there is one.
  """

  name: str
  folder: Path
  key: str
  run_id: str
  sent: int
  first_round: int
  params: Mapping[str, Any]
  tags: Mapping[str, str]


class Opened(NamedTuple):
  """A run that a tracker has created or joined.

  Attributes:
    run_id: the tracker's own name of the run.
    sent: the round through which the tracker has every row; -1: none.
    newest: the newest round of which it may have a part; -1: none.
    warning: a line for the user; "" for none.
  """

  run_id: str
  sent: int = -1
  newest: int = -1
  warning: str = ""


class Tracker:
  r"""A place that the metrics of a run are sent to; derive yours from it.

  All methods of a tracker are called by one thread, not that of the run. They
  may take long and raise anything: the run goes on, and a failed call is tried
  again. Rows that a method gets are in order, and each checkpoint that holds
  them is committed.

  Attributes:
    live: the tracker writes local files, in the run's own thread, before the
      checkpoint: its errors end the run, and what it wrote after a restored
      checkpoint is written again.
    place: where on which server the run is, without passwords. Rows sent to
      another place do not count; "" if there is only one.

  Example:
    class Lines(Tracker):
      def open(self, run):
        self._path = run.folder / "lines.txt"
        return Opened(run.key, run.sent)

      def send(self, rows):
        with self._path.open("a") as file:
          file.writelines(f"{row}\n" for row in rows)
  """

  live: bool = False
  place: str = ""

  def open(self, run: RunFacts) -> Opened:
    """Create the run, or join the one of before; called until it succeeds."""
    raise NotImplementedError

  def unsent(self, rows: Sequence[Row]) -> list[Row]:
    """Return the rows without the metrics that the server already has.

    Called before `send` for rows of which a part may have arrived.
    """
    return list(rows)

  def send(self, rows: Sequence[Row]) -> None:
    """Send rows; return when the server, or a file, has them."""
    raise NotImplementedError

  def flush(self) -> None:
    """Write all rows to the file; called of a live tracker alone."""

  def close(self, status: Status, files: Sequence[Path]) -> None:
    """End the run on the server.

    Args:
      status: how it ended.
      files: results to send along, in the workdir.
    """
