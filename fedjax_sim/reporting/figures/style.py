"""How figures look: on the screen, and in the columns of a paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Each has a contrast of 3 or more with white.
PALETTE = (
  "#1f6fb4",
  "#c75a00",
  "#2a8a3a",
  "#c62f30",
  "#7a52b3",
  "#7d5147",
  "#c04a9e",
  "#5f6368",
  "#7f7f00",
  "#0b8494",
)
INK = "#010203"  # of axes and letters where a page decides their color
FAINT = "#030201"  # of grids there
BACKGROUND = "#fefefe"  # around stars
LINES = ("-", "--", ":", "-.")


class Style(NamedTuple):
  """Sizes and fonts of a figure.

  Attributes:
    width: of a panel, in inches.
    height: of a panel, in inches.
    linewidth: of curves, in points.
    markersize: of points, in points.
    told: whether legends have numbers.
    rc: Matplotlib's settings, for `rc_context`.
  """

  width: float
  height: float
  linewidth: float
  markersize: float
  told: bool
  rc: Mapping[str, Any]


SCREEN = Style(5.5, 4.2, 1.6, 4.0, True, {})
PAPER = Style(
  width=3.25,  # of a column
  height=2.2,
  linewidth=1.0,
  markersize=2.5,
  told=False,
  rc={
    "font.family": "STIXGeneral",  # comes with Matplotlib
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.linewidth": 0.4,
    "pdf.fonttype": 42,  # fonts as publishers ask for them
    "svg.fonttype": "path",
    "svg.hashsalt": "paper",
  },
)


def color(index: int) -> str:
  """Return the palette's color of this number, from 0."""
  return PALETTE[index % len(PALETTE)]


def against_rounds(ax: Axes) -> None:
  """Let the horizontal axis be of rounds, and take away what is no data."""
  from matplotlib.ticker import MaxNLocator

  ax.set_xlim(left=0)
  ax.set_xlabel("Round")
  ax.xaxis.set_major_locator(
    MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
  )
  plain(ax)


def plain(ax: Axes) -> None:
  """Add a faint grid, and remove the frame's upper and right lines."""
  ax.grid(alpha=0.3)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
