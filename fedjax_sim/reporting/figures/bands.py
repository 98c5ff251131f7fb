"""Curves with bands: means over runs, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedjax_sim.reporting.figures import style
from fedjax_sim.reporting.figures.curves import draw_line
from fedjax_sim.reporting.figures.overlay import short_name
from fedjax_sim.reporting.figures.series import Line, drawable
from fedjax_sim.reporting.figures.style import SCREEN, Style

if TYPE_CHECKING:
  from matplotlib.axes import Axes

MOST_BANDS = len(style.PALETTE)  # that one picture can tell apart


class Band(NamedTuple):
  """A curve with a band around it.

  Attributes:
    name: what the legend calls it.
    color: its number in the palette.
    rounds: shape=(points,), integer.
    middle: shape=(points,).
    low: shape=(points,); NaN where there is no band.
    high: shape=(points,).
  """

  name: str
  color: int
  rounds: np.ndarray
  middle: np.ndarray
  low: np.ndarray
  high: np.ndarray


def draw_bands(
  ax: Axes,
  bands: Sequence[Band],
  label: str,
  look: Style = SCREEN,
  *,
  zero: bool = False,
) -> None:
  """Draw curves with their bands against the round.

  Args:
    ax: where to.
    bands: at most `MOST_BANDS`.
    label: of the vertical axis.
    look: sizes and fonts.
    zero: whether a line marks 0.
  """
  for band in bands:
    color = style.color(band.color)
    kind = style.LINES[band.color % len(style.LINES)]
    line = Line(("",), band.rounds, band.middle)  # stars are for single runs
    draw_line(ax, line, short_name(band.name, 44), color, kind, look)
    ax.fill_between(
      band.rounds,
      drawable(band.low),
      drawable(band.high),
      color=color,
      alpha=0.18,
      linewidth=0,
    )
  if zero:
    ax.axhline(0, color=style.PALETTE[7], linewidth=look.linewidth / 2)
  if bands:
    ax.legend(frameon=False, fontsize=8 if look.told else None)
  ax.set_ylabel(label)
  style.against_rounds(ax)
