"""The files of a comparison: tables, curves and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedjax_sim.core.files import PathLike, write_atomically
from fedjax_sim.studies import comparison_tables as tables
from fedjax_sim.studies.comparison import Comparison
from fedjax_sim.studies.comparison_curves import write_curves
from fedjax_sim.studies.comparison_page import page_of

PAGE = "report.html"
_TEXTS: Mapping[str, Callable[[Comparison], str]] = {
  "comparison.md": tables.markdown,
  "comparison.tex": tables.latex,
  "comparison.csv": tables.settings_csv,
  "pairs.csv": tables.pairs_csv,
  PAGE: page_of,
}


def write_files(comparison: Comparison, folder: PathLike) -> None:
  """Write tables, `curves.png` and `report.html`, each atomically.

  Args:
    comparison: what to write.
    folder: where to; made if missing.

  Raises:
    OSError: a file cannot be written.
  """
  place = Path(folder)
  place.mkdir(parents=True, exist_ok=True)
  for name, text in _TEXTS.items():
    write_atomically(place / name, text(comparison).encode())
  write_curves(comparison, place / "curves.png")
