"""What tests of whole runs share."""

import pathlib

import pytest

from fedjax_sim import reporting
from fedjax_sim.run import report


def skip_pictures(patch: pytest.MonkeyPatch) -> None:
  """Leave out curves and report, which take longer than a quick run."""
  patch.setattr(reporting, "draw_curves", lambda *_: None)
  patch.setattr(report, "write_report", lambda *_: None)


def first_rounds(folder: pathlib.Path) -> list[int]:
  """The first round of every process that began to write events, in order.

  A run that begins anew has the same bits in the end as one that went on; here
  it has a 1 more.
  """
  return [int(p.name.split(".")[-1]) for p in sorted(folder.glob("events/*"))]
