"""Figures as SVG inside a page, in the page's colors and fonts.

Letters stay letters. Colors are variables of the page's style sheet, so that
one figure does for light and dark: `currentColor` is that of axes and letters,
`--faint` that of grids, `--c0`, `--c1`, ... those of the palette, and
`--background` the page's.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedjax_sim.reporting.figures.style import (
  BACKGROUND,
  FAINT,
  INK,
  PALETTE,
)

if TYPE_CHECKING:
  from matplotlib.figure import Figure


@contextlib.contextmanager
def page_style() -> Iterator[None]:
  """Give figures that are made meanwhile the colors that a page replaces."""
  import matplotlib as mpl
  from cycler import cycler

  settings: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.prop_cycle": cycler(color=PALETTE),
    "font.size": 9,
    "svg.fonttype": "none",
  }
  with mpl.rc_context(settings):
    yield


def inline_svg(figure: Figure, name: str, label: str) -> str:
  """Return a figure as an `<svg>` element.

  Args:
    figure: made under `page_style`, which still holds.
    name: begins the ids inside; each figure of a page has another.
    label: what it shows, for those who do not see it.
  """
  import matplotlib as mpl
  from matplotlib.backends.backend_svg import FigureCanvasSVG

  image = io.StringIO()
  with mpl.rc_context({"svg.hashsalt": name}):
    # `savefig` would draw it twice.
    FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None})
  text = image.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
  head, _, body = text.partition(">")
  (box,) = re.findall(r'viewBox="([^"]*)"', head)
  body = _with_ids(body, name)
  for i, color in enumerate(PALETTE):
    body = body.replace(color, f"var(--c{i})")
  body = body.replace(INK, "currentColor")
  body = body.replace(FAINT, "var(--faint)")
  body = body.replace(BACKGROUND, "var(--background)")
  body = re.sub(r"\n\s*", "\n", body)
  width = float(box.split()[2]) * 5 / 3  # a point is 4/3 of a CSS pixel
  return (
    f'<svg role="img" aria-label="{html.escape(label)}" viewBox="{box}"'
    f' style="max-width: {width:.0f}px">{body}'
  )


def _with_ids(body: str, name: str) -> str:
  """Let ids that are referred to begin with the name; remove all others."""
  used = {
    *re.findall(r'href="#([^"]+)"', body),
    *re.findall(r"url\(#([^)]+)", body),
  }

  def replaced(found: re.Match[str]) -> str:
    return f' id="{name}-{found[1]}"' if found[1] in used else ""

  body = re.sub(r' id="([^"]+)"', replaced, body)
  body = body.replace('href="#', f'href="#{name}-')
  return body.replace("url(#", f"url(#{name}-")
