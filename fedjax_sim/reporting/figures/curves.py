"""`curves.png`: losses, accuracies, epsilon and more against the round."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures import style
from fedjax_sim.reporting.figures.png import write_png
from fedjax_sim.reporting.figures.series import (
  Line,
  drawable,
  group,
  groups_of,
  panels_of,
)
from fedjax_sim.reporting.figures.style import SCREEN, Style
from fedjax_sim.reporting.metrics_file import Row

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

ACROSS = 4  # panels side by side; others are below them
FEW = 30  # points; fewer are marked one by one


def draw_curves(
  rows: Iterable[Row],
  path: str | os.PathLike[str],
  title: str,
  best_round: int | None = None,
) -> None:
  """Draw a PNG with a panel of losses, accuracies, epsilon and known metrics.

  A panel holds every key whose last part, or last but `/mean`, ends with its
  word: `train/loss`, `seen/accuracy/mean`. A panel without any is left out.
  Known metrics are those of `core/metric_names.py`, such as `auc`.
  Metrics with equal values share a line. A star marks the best value of each
  line; the legend has it and the last value.

  Args:
    rows: one a round; keys may be missing in some, values may be NaN or None.
    path: the file; replaced atomically.
    title: stands above the panels.
    best_round: of the model that the run kept as its best; None: it kept none.

  Raises:
    OSError: the file cannot be written.
  """
  write_png(curves_figure(rows, title, best_round), path)


def curves_figure(
  rows: Iterable[Row], title: str, best_round: int | None = None
) -> Figure:
  """Return the figure of `draw_curves`, whose arguments these are."""
  panels = panels_of(rows) or {"Loss": []}
  across = min(len(panels), ACROSS)
  down = -(-len(panels) // across)
  figure = new_figure(across, SCREEN, down)
  figure.suptitle(title, parse_math=False)
  colors = colors_of(panels)
  axes = figure.subplots(down, across, sharex=True, squeeze=False).ravel()
  for ax, (label, lines) in zip(axes, panels.items(), strict=False):
    draw_panel(ax, label, lines, colors, best_round=best_round)
  for i in range(len(panels), len(axes)):
    axes[i].set_axis_off()
    axes[i - across].tick_params(labelbottom=True)
  return figure


def new_figure(across: int, look: Style, down: int = 1) -> Figure:
  """Return an empty figure with room for so many panels."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  size = (across * look.width, down * look.height)
  figure = Figure(figsize=size, dpi=120)
  figure.set_layout_engine("constrained", wspace=0.06)
  FigureCanvasAgg(figure)
  return figure


def colors_of(panels: Mapping[str, Sequence[Line]]) -> dict[str, str]:
  """Return a color for each of train, test, ...; the same in all panels."""
  return {name: style.color(i) for i, name in enumerate(groups_of(panels))}


def draw_panel(
  ax: Axes,
  label: str,
  lines: Sequence[Line],
  colors: Mapping[str, str],
  *,
  best_round: int | None = None,
  look: Style = SCREEN,
) -> None:
  """Draw lines against the round, each of train, test, ... in its color.

  Args:
    ax: where to.
    label: of the vertical axis.
    lines: one a metric.
    colors: of `colors_of`.
    best_round: a round to mark by a vertical line; None: none.
    look: sizes and fonts.
  """
  used: collections.Counter[str] = collections.Counter()
  for line in lines:
    name = group(line.keys[0])
    linestyle = style.LINES[used[name] % len(style.LINES)]
    text = described(line) if look.told else line.name
    draw_line(ax, line, text, colors[name], linestyle, look)
    used[name] += 1
  if best_round is not None:
    ax.axvline(
      best_round,
      color=style.PALETTE[7],
      linewidth=look.linewidth / 2,
      linestyle="--",
      zorder=0,
      label=f"best model, round {best_round:,}" if look.told else "best model",
    )
  if lines:
    ax.legend(frameon=False, fontsize=8 if look.told else None)
  ax.set_ylabel(label)
  style.against_rounds(ax)


def draw_line(
  ax: Axes, line: Line, text: str, color: str, linestyle: str, look: Style
) -> None:
  """Draw a line, with a star at its best value where legends have numbers."""
  ax.plot(
    line.rounds,
    drawable(line.values),
    label=_legend(text),
    color=color,
    linestyle=linestyle,
    linewidth=look.linewidth,
    marker="o" if len(line.rounds) <= FEW else None,
    markersize=look.markersize,
  )
  best = line._replace(values=drawable(line.values)).best
  if look.told and best is not None:
    ax.plot(
      *([best.round], [best.value]),
      color=color,
      linestyle="none",
      marker="*",
      markersize=3 * look.markersize,
      markeredgecolor=style.BACKGROUND,
      markeredgewidth=0.6,
      zorder=3,
    )


def _legend(text: str) -> str:
  """Return a text as a legend shows it, which hides those that begin with _."""
  text = text.replace("$", r"\$")
  return f" {text}" if text.startswith("_") else text


def described(line: Line) -> str:
  """Return a line's name, its last value, and the best if that is another."""
  last, best = line.last, line.best
  if last is None:
    return line.name
  text = f"{line.name}: {formatting.number(last.value)}"
  if best is None or best.value == last.value:
    return text
  value = formatting.number(best.value)
  return f"{text} (best {value}, round {best.round:,})"
