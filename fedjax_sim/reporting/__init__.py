"""What a run leaves behind and shows: files, curves, a report, progress.

Plain Python throughout: metrics arrive as rows, `dict[str, float]`. Jinja,
Matplotlib, rich and pyarrow are imported where they are used.
"""

from fedjax_sim.core.files import (
  replace_atomically,
  write_atomically,
  write_json,
)
from fedjax_sim.reporting.client_rounds import (
  ClientRounds,
  draw_client_rounds,
  join_client_rounds,
  remove_parts,
)
from fedjax_sim.reporting.events import EventFiles
from fedjax_sim.reporting.figures.client_picture import (
  MOST_BARS,
  MOST_NAMES,
  draw_clients,
)
from fedjax_sim.reporting.figures.curves import draw_curves
from fedjax_sim.reporting.figures.overlay import PAPER_SUFFIXES, draw_paper
from fedjax_sim.reporting.figures.privacy_curves import (
  Setting,
  draw_privacy_curves,
  write_privacy_curves,
)
from fedjax_sim.reporting.html import unique_names, write_html
from fedjax_sim.reporting.import_progress import written
from fedjax_sim.reporting.metrics_file import (
  MetricsFile,
  MetricsReader,
  columns,
  read_metrics,
)
from fedjax_sim.reporting.pages.described import DescribedRun
from fedjax_sim.reporting.pages.record import NoRunError, RunRecord, read_run
from fedjax_sim.reporting.progress import Progress
from fedjax_sim.reporting.table import (
  final_text,
  phases_text,
  print_final_table,
  print_phases,
)

# What drawing a run's pictures and page imports, and nothing before it does.
LATER = ("matplotlib.backends.backend_agg", "matplotlib.figure", "jinja2")

__all__ = [
  "LATER",
  "MOST_BARS",
  "MOST_NAMES",
  "PAPER_SUFFIXES",
  "ClientRounds",
  "DescribedRun",
  "EventFiles",
  "MetricsFile",
  "MetricsReader",
  "NoRunError",
  "Progress",
  "RunRecord",
  "Setting",
  "columns",
  "draw_client_rounds",
  "draw_clients",
  "draw_curves",
  "draw_paper",
  "draw_privacy_curves",
  "final_text",
  "join_client_rounds",
  "phases_text",
  "print_final_table",
  "print_phases",
  "read_metrics",
  "read_run",
  "remove_parts",
  "replace_atomically",
  "unique_names",
  "write_atomically",
  "write_html",
  "write_json",
  "write_privacy_curves",
  "written",
]
