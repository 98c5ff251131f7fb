"""What tests of whole runs share."""

import pytest

from fedjax_sim import reporting
from fedjax_sim.run import report


def skip_pictures(patch: pytest.MonkeyPatch) -> None:
  """Leave out curves and report, which take longer than a quick run."""
  patch.setattr(reporting, "draw_curves", lambda *_: None)
  patch.setattr(report, "write_report", lambda *_: None)
