"""Curves of several runs, a panel a metric and a color a run."""

from __future__ import annotations

import io
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_sim.core import metric_names, validate
from fedjax_sim.core.files import write_atomically
from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures import style
from fedjax_sim.reporting.figures.curves import (
  colors_of,
  draw_line,
  draw_panel,
  new_figure,
)
from fedjax_sim.reporting.figures.series import (
  Line,
  group,
  in_order,
  kind,
  line_of,
  panels_of,
)
from fedjax_sim.reporting.figures.style import PAPER, SCREEN, Style
from fedjax_sim.reporting.metrics_file import Row, columns

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_SETS = ("test", "seen", "unseen", "train")
PAPER_SUFFIXES = (".pdf", ".svg", ".png")


def compared_metrics(runs: Iterable[Iterable[Row]]) -> list[str]:
  """Return the metrics of the runs that have a panel, panel by panel.

  The mean over clients is left out where there is the mean over examples.
  """
  keys = dict.fromkeys(key for rows in runs for key in columns(rows))
  known = [key for key in keys if kind(key) and not _repeated(key, keys)]
  words = in_order(kind(key) or "" for key in known)
  return sorted(known, key=lambda key: words.index(kind(key) or ""))


def _repeated(key: str, keys: Container[str]) -> bool:
  return key.endswith("/mean") and key.removesuffix("/mean") in keys


def draw_overlay(
  ax: Axes,
  key: str,
  runs: Mapping[str, Iterable[Row]],
  look: Style = SCREEN,
  *,
  names: bool = True,
) -> None:
  """Draw one metric of several runs; a run without it has no line.

  Args:
    ax: where to.
    key: the metric.
    runs: name -> its rows.
    look: sizes and fonts.
    names: whether a legend has the runs' names.
  """
  drawn = False
  for i, (name, rows) in enumerate(runs.items()):
    line = line_of(rows, key)
    if line.last is None:
      continue
    drawn = True
    text = name
    if look.told:
      text = f"{short_name(name)}: {_value(line)}"
    linestyle = style.LINES[i % len(style.LINES)]  # one may lie on another
    draw_line(ax, line, text, style.color(i), linestyle, look)
  if drawn and names:
    ax.legend(frameon=False, fontsize=8 if look.told else None)
  ax.set_ylabel(metric_names.display(key))
  style.against_rounds(ax)


def draw_names(ax: Axes, names: Sequence[str]) -> None:
  """Draw which color and kind of line each run has, without any data."""
  nothing = Line(("",), np.zeros(1, int), np.full(1, np.nan))
  for i, name in enumerate(names):
    linestyle = style.LINES[i % len(style.LINES)]
    draw_line(ax, nothing, short_name(name), style.color(i), linestyle, SCREEN)
  ax.legend(frameon=False, fontsize=8, loc="upper left", borderpad=0)
  ax.set_axis_off()


def _value(line: Line) -> str:
  last = line.last
  return "" if last is None else formatting.number(last.value)


def short_name(name: str, most: int = 32) -> str:
  """Return a run's name as legends show it, without the middle if long."""
  half = most // 2 - 1
  return name if len(name) <= most else f"{name[:half]}...{name[-half:]}"


def draw_paper(
  runs: Mapping[str, Sequence[Row]],
  path: str | os.PathLike[str],
  metrics: Sequence[str] = (),
) -> None:
  """Draw the curves of runs for a paper, a column wide, panel below panel.

  One run has a panel of losses, of accuracies, of epsilon and of each known
  metric; several have a panel for each metric of the first of test, seen,
  unseen and train that they have.

  Args:
    runs: name -> its rows.
    path: the file, `.pdf`, `.svg` or `.png`; replaced atomically.
    metrics: a panel for each of them instead.

  Raises:
    UnknownNameError: no run has such a metric.
    OSError: the file cannot be written.
  """
  import matplotlib as mpl

  known = {key for rows in runs.values() for key in columns(rows)}
  for key in metrics:
    validate.one_of("metrics", key, sorted(known))
  suffix = Path(path).suffix
  image = io.BytesIO()
  metadata = {
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
    ".png": {"Software": None},
  }[suffix]
  settings: Any = dict(PAPER.rc)
  with mpl.rc_context(settings):
    figure = paper_figure(runs, metrics)
    figure.savefig(image, format=suffix[1:], dpi=300, metadata=metadata)
  write_atomically(path, image.getvalue())


def paper_figure(
  runs: Mapping[str, Sequence[Row]], metrics: Sequence[str] = ()
) -> Figure:
  """Return the figure of `draw_paper`, under its settings."""
  if len(runs) == 1 and not metrics:
    (rows,) = runs.values()
    keys = columns(rows)
    panels = panels_of(
      {k: v for k, v in row.items() if not _repeated(k, keys)} for row in rows
    ) or {"Loss": []}
    figure = new_figure(1, PAPER, len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    colors = colors_of(panels)
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
      draw_panel(ax, label, lines, colors, look=PAPER)
    return figure
  chosen = [*metrics] or _of_first_set(compared_metrics(runs.values()))
  figure = new_figure(1, PAPER, len(chosen))
  axes = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
  for ax, key in zip(axes, chosen, strict=True):
    draw_overlay(ax, key, runs, PAPER)
  return figure


def _of_first_set(keys: Sequence[str]) -> list[str]:
  """Return the metrics of test, else of seen, ..., and those of no set."""
  for name in _SETS:
    if any(group(key) == name for key in keys):
      return [k for k in keys if group(k) not in {*_SETS} - {name}]
  return [*keys] or ["loss"]
