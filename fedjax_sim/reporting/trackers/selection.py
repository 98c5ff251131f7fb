"""Which metrics of a row a tracker gets, and under which names."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

from fedjax_sim.reporting.trackers.protocol import Row


class Selection(NamedTuple):
  """The metrics that a tracker gets.

  Attributes:
    metrics: patterns of `fnmatch`; None: all metrics.
    primary: a metric that is sent under its last part, too; None: none is.

  Example:
    select = Selection(("test/*",), "test/accuracy")
    select({"round": 1, "train/loss": 0.5, "test/accuracy": 0.9})
    # {"round": 1, "test/accuracy": 0.9, "accuracy": 0.9}
  """

  metrics: tuple[str, ...] | None = None
  primary: str | None = None

  def check(self, section: str) -> Selection:
    """Return itself, if its parts are of the right types.

    Raises:
      TypeError, ValueError: they are not; names the field in `section`.
    """
    for pattern in self.metrics or ():
      if not isinstance(pattern, str):
        raise TypeError(
          f"{section}.metrics={self.metrics!r} holds a"
          f" {type(pattern).__name__}; give patterns, such as 'test/*'."
        )
    if self.primary is not None and "/" not in self.primary:
      raise ValueError(
        f"{section}.primary_metric={self.primary!r} has no part after a slash;"
        " give a metric such as 'test/accuracy', or None."
      )
    return self

  def __call__(self, row: Row) -> dict[str, float]:
    """Return the row with what is selected."""
    found = {k: v for k, v in row.items() if k == "round" or self._wants(k)}
    if self.primary is not None and self.primary in row:
      found[self.primary.rpartition("/")[2]] = row[self.primary]
    return found

  def _wants(self, name: str) -> bool:
    return self.metrics is None or any(
      fnmatch.fnmatchcase(name, pattern) for pattern in self.metrics
    )
