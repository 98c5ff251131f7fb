"""How fast it is: `python -m benchmarks.engine`, `... benchmarks.scaling`."""

from __future__ import annotations

import sys
from types import TracebackType


def _told(
  kind: type[BaseException],
  error: BaseException,
  trace: TracebackType | None,
) -> None:
  """Print what ends a command: of Ctrl-C, a line."""
  if issubclass(kind, KeyboardInterrupt):
    print("interrupted", file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _told
