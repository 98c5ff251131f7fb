"""Bars of what each client, or group of clients, does to a metric."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedjax_sim.reporting.figures import style
from fedjax_sim.reporting.figures.overlay import short_name
from fedjax_sim.reporting.figures.png import write_png

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MOST_BARS = 80  # in a panel
_LETTERS = 18  # of a name that are shown


class Panel(NamedTuple):
  """The bars of a setting.

  Attributes:
    title: names it; "" for none.
    names: of the players, in the order of their bars.
    values: shape=(players,).
    errors: shape=(players,); standard errors, NaN where they are not known.
  """

  title: str
  names: Sequence[str]
  values: np.ndarray
  errors: np.ndarray


def draw_players(
  panels: Sequence[Panel],
  label: str,
  path: str | os.PathLike[str],
  *,
  higher_is_better: bool,
) -> None:
  """Draw a PNG with a panel for each setting, one below the other.

  Args:
    panels: one at least; of more than `MOST_BARS` players the first and the
      last ones are drawn.
    label: of the vertical axes.
    path: the file; replaced atomically.
    higher_is_better: whether a bar above 0 is of a player who helps.

  Raises:
    OSError: the file cannot be written.
  """
  figure = players_figure(panels, label, higher_is_better=higher_is_better)
  write_png(figure, path)


def players_figure(
  panels: Sequence[Panel], label: str, *, higher_is_better: bool
) -> Figure:
  """Return the figure of `draw_players`, whose arguments these are."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  bars = min(MOST_BARS, max(len(panel.names) for panel in panels))
  size = max(5.5, 1.5 + 0.19 * bars), 3.8 * len(panels)
  figure = Figure(figsize=size, dpi=120)
  figure.set_layout_engine("constrained")
  FigureCanvasAgg(figure)
  axes = np.atleast_1d(figure.subplots(len(panels), 1)).tolist()
  for ax, panel in zip(axes, panels, strict=True):
    draw_panel(ax, panel, higher_is_better=higher_is_better)
    ax.set_ylabel(label, parse_math=False)
  return figure


def draw_panel(ax: Axes, panel: Panel, *, higher_is_better: bool) -> None:
  """Draw the bars of a panel, helpers in one color and others in another.

  Args:
    ax: where to.
    panel: of it; see `draw_players`.
    higher_is_better: whether a bar above 0 is of a player who helps.
  """
  shown, title = _shown(len(panel.names)), panel.title
  if len(shown) < len(panel.names):
    note = f"the first and last {len(shown) // 2} of {len(panel.names)}"
    title = f"{title}: {note}" if title else note
  values, errors = panel.values[shown], panel.errors[shown]
  helps = values > 0 if higher_is_better else values < 0
  colors = [style.color(0 if good else 1) for good in helps]
  at = np.arange(len(shown))
  ax.bar(at, np.nan_to_num(values), 0.75, color=colors)
  known = np.isfinite(errors) & np.isfinite(values)
  ax.errorbar(
    at[known],
    values[known],
    errors[known],
    fmt="none",
    ecolor="#333333",
    elinewidth=0.9,
    capsize=1.5,
  )
  ax.axhline(0, color="#333333", linewidth=0.8)
  names = [short_name(panel.names[i], _LETTERS) for i in shown]
  crowded = sum(map(len, names)) > 60
  ax.set_xticks(
    at, names, rotation=90 if crowded else 0, fontsize=8, parse_math=False
  )
  ax.set_xlim(-0.8, len(shown) - 0.2)
  if title:
    ax.set_title(title, fontsize=10, parse_math=False)
  style.plain(ax)
  ax.grid(visible=False, axis="x")


def _shown(count: int) -> np.ndarray:
  """Return which of so many bars are drawn."""
  if count <= MOST_BARS:
    return np.arange(count)
  half = MOST_BARS // 2
  return np.concatenate([np.arange(half), np.arange(count - half, count)])
