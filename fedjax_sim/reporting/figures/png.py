"""Figures as PNG files."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from fedjax_sim.core.files import write_atomically

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def write_png(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Write a figure as a PNG file, the same bytes wherever it is drawn.

  Args:
    figure: what to draw.
    path: the file; replaced atomically.

  Raises:
    OSError: the file cannot be written.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  image = io.BytesIO()
  # `Figure.savefig` would draw it twice.
  FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
  write_atomically(path, image.getvalue())
