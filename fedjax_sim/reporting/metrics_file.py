"""`metrics.jsonl`: one row a round, one JSON object a line.

A run may be killed at any moment and go on from a checkpoint. The file is
first cut back to that checkpoint's round, so that it ends up byte for byte as
if nothing had happened: no row lost, none doubled. A row of round 0 holds what
was measured before the first one; a file need not have it.

JSON has no NaN and no infinities: both are written as null and read as NaN.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from fedjax_sim.core import validate
from fedjax_sim.core.files import plain, write_atomically

Row = Mapping[str, float]  # "round" (a whole number) and what is known of it


_NONE = -1  # the round of the last row, where there is no row


class MetricsFile:
  """Appends rows to a file that survives kills.

  A context manager; leaving it closes the file.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    keep_through: int,
    complete: bool = True,
  ):
    """Open `path`, cut back to the rows of rounds <= `keep_through`.

    The cut drops later rows and a last line torn by a kill. A file that needs
    no cut is not rewritten.

    Args:
      path: the file; made if missing, its folder must exist.
      keep_through: the round of the checkpoint to go on from; 0 starts anew.
      complete: every round has its row. False allows rounds without one, as in
        `timings.jsonl`, but still no round twice.

    Raises:
      ValueError: a row that is to be kept is damaged, missing or out of order.
      OSError: the file cannot be written.
    """
    self._path = Path(path)
    self._complete = complete
    self._last = keep_through or _NONE
    content = self._path.read_bytes() if self._path.exists() else None
    kept = _kept(self._path, content or b"", keep_through, complete)
    if kept != content:
      write_atomically(self._path, kept)
    self._file = self._path.open("ab")

  def __enter__(self) -> MetricsFile:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def append(self, rows: Iterable[Row]) -> None:
    """Write rows, in the order of their rounds, and flush.

    Keys keep the order given, after "round"; floats read back exactly.

    Raises:
      ValueError: a row's round does not follow the one before.
      TypeError: a row's round is missing or not a whole number.
    """
    lines = []
    last = self._last
    for row in rows:
      last = _following(str(self._path), row, last, self._complete)
      lines.append(_line({"round": last, **row}))
    self._file.write(b"".join(lines))
    self._file.flush()
    self._last = last

  def sync(self) -> None:
    """Write all rows to the disk; call it before a checkpoint commits."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Write all rows to the disk, and close the file; twice is harmless."""
    if not self._file.closed:
      try:
        self.sync()
      finally:  # a full disk leaves no file open
        self._file.close()


class MetricsReader:
  """Reads rows of a file that a run still writes, from an offset on.

  Args:
    path: of a file that nobody cuts back while it is read.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self._path = Path(path)
    self._after, self._offset = _NONE, 0

  def read(
    self, after: int, through: int, most: int | None = None
  ) -> list[dict[str, float]]:
    """Return the first rows of rounds > `after` and <= `through`.

    Args:
      after: a round, not less than in earlier calls for the best speed.
      through: a round.
      most: number of rows; None: all.

    Raises:
      ValueError: a line is damaged.
      OSError: the file cannot be read.
    """
    if after < self._after:
      self._offset = 0
    self._after = after
    found: list[dict[str, float]] = []
    with self._path.open("rb") as file:
      file.seek(self._offset)
      for line in file:
        if not line.endswith(b"\n") or len(found) == most:
          break
        row = _parse(str(self._path), line)
        if row["round"] > through:
          break
        if row["round"] > after:
          found.append(row)
        elif not found:
          self._offset += len(line)
    return found


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
  """Read the rows of a file, also of one that a run still writes.

  Returns:
    The rows as they were appended, with NaN for null. A torn last line is
    left out.

  Raises:
    ValueError: a line is damaged.
  """
  lines = _whole_lines(Path(path).read_bytes())
  return [_parse(f"{path}, line {i}", line) for i, line in enumerate(lines, 1)]


def columns(
  rows: Iterable[Row],
) -> dict[str, tuple[list[int], list[float]]]:
  """Return key -> (rounds, values), over the rows that have the key."""
  result: dict[str, tuple[list[int], list[float]]] = {}
  for row in rows:
    for key, value in row.items():
      if key != "round":
        rounds, values = result.setdefault(key, ([], []))
        rounds.append(int(row["round"]))
        values.append(value)
  return result


def _kept(path: Path, content: bytes, through: int, complete: bool) -> bytes:
  """Return the lines of rounds <= `through`; what follows is not checked."""
  kept = []
  last = _NONE if through else 0
  for number, line in enumerate(_whole_lines(content), 1):
    if last == through:
      break
    where = f"{path}, line {number}"
    row = _parse(where, line)
    if not complete and row["round"] > through:
      break
    last = _following(where, row, last, complete)
    kept.append(line + b"\n")
  if complete and max(last, 0) != through:
    raise ValueError(
      f"{path} ends with round {max(last, 0)}, but the checkpoint is of round"
      f" {through}; restore the file or start in a new folder."
    )
  return b"".join(kept)


def _whole_lines(content: bytes) -> list[bytes]:
  """Return the lines of a file, without a last one torn by a kill."""
  *lines, rest = content.split(b"\n")
  try:
    _parse("the last line", rest)
  except ValueError:
    return lines
  return [*lines, rest]  # only its end of line is missing


def _parse(where: str, line: bytes) -> dict[str, float]:
  """Return a line's row; the error of a damaged line begins with `where`."""
  try:
    row = json.loads(line)
    if not isinstance(row, dict):
      raise ValueError("no JSON object")
    validate.integer("round", row.get("round"), ge=0)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{where} is damaged ({error}); restore the file or start in a new"
      " folder."
    ) from error
  nan = float("nan")
  return {key: nan if value is None else value for key, value in row.items()}


def _following(where: str, row: Row, last: int, complete: bool) -> int:
  """Return the round of `row`, which must follow round `last`."""
  round_ = validate.integer(f"{where}: round", row.get("round"), ge=0)
  following = max(last, 0) + 1
  begins = last == _NONE and round_ == 0
  if not begins and (round_ < following or (complete and round_ != following)):
    wanted = (
      f"round {following}" if complete else f"a round after {following - 1}"
    )
    raise ValueError(
      f"{where}: a row of round {round_} stands where {wanted} belongs;"
      " restore the file or start in a new folder."
    )
  return round_


def _line(row: Row) -> bytes:
  return json.dumps(plain(row), allow_nan=False).encode() + b"\n"
