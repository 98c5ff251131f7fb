"""The files of a comparison: tables, curves and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedjax_sim.core.files import PathLike, write_atomically
from fedjax_sim.studies import comparison_tables as tables
from fedjax_sim.studies.comparison import Comparison
from fedjax_sim.studies.comparison_curves import write_curves
from fedjax_sim.studies.comparison_page import page_of
from fedjax_sim.studies.influence_page import influence_sections

PAGE = "report.html"
_TEXTS: Mapping[str, Callable[[Comparison], str]] = {
  "comparison.md": tables.markdown,
  "comparison.tex": tables.latex,
  "comparison.csv": tables.settings_csv,
  "pairs.csv": tables.pairs_csv,
}


def check_folder(folder: PathLike) -> Path:
  """Return the folder of a comparison's files, if it may become one.

  Raises:
    NotADirectoryError: there is a file in its place.
  """
  place = Path(folder)
  for path in (place, *place.parents):
    if path.exists() and not path.is_dir():
      raise NotADirectoryError(f"to={place}: {path} is a file; name a folder.")
  return place


def write_files(comparison: Comparison, folder: PathLike) -> None:
  """Write tables, `curves.png` and `report.html`, each atomically.

  Args:
    comparison: what to write.
    folder: where to; made if missing. The page of a study that left clients
      out has their influences, too, if this is its own folder.

  Raises:
    OSError: a file cannot be written.
  """
  place = check_folder(folder)
  place.mkdir(parents=True, exist_ok=True)
  for name, text in _TEXTS.items():
    write_atomically(place / name, text(comparison).encode())
  page = page_of(comparison, influence_sections(place))
  write_atomically(place / PAGE, page.encode())
  write_curves(comparison, place / "curves.png")
