"""`curves.png`: losses, accuracies and epsilon against the round."""

from __future__ import annotations

import collections
import io
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedjax_sim.core.files import write_atomically
from fedjax_sim.reporting.metrics_file import Row, columns

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_Series = Mapping[str, tuple[list[int], list[float]]]
_PANELS = {"loss": "Loss", "accuracy": "Accuracy", "epsilon": "Epsilon"}
_STYLES = ("-", "--", ":", "-.")
_FEW = 30  # points; fewer are marked one by one


def draw_curves(
  rows: Iterable[Row], path: str | os.PathLike[str], title: str
) -> None:
  """Draw a PNG with a panel of losses, of accuracies and of epsilon.

  A panel holds every key whose last part, or last but `/mean`, ends with its
  word: `train/loss`, `seen/accuracy/mean`. A panel without any is left out.

  Args:
    rows: one a round; keys may be missing in some, values may be NaN or None.
    path: the file; replaced atomically.
    title: stands above the panels.

  Raises:
    OSError: the file cannot be written.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  series = columns(rows)
  panels = {
    label: chosen
    for word, label in _PANELS.items()
    if (chosen := _ending(series, word))
  } or {"Loss": {}}
  figure = Figure(figsize=(1 + 5 * len(panels), 4.2), dpi=120)
  figure.set_layout_engine("constrained", wspace=0.06)
  FigureCanvasAgg(figure)
  figure.suptitle(title, parse_math=False)
  groups = dict.fromkeys(_group(key) for c in panels.values() for key in c)
  colors = {group: f"C{index % 10}" for index, group in enumerate(groups)}
  axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
  for ax, (label, chosen) in zip(axes, panels.items(), strict=True):
    _draw_panel(ax, label, chosen, colors)
  image = io.BytesIO()
  figure.savefig(image, format="png", metadata={"Software": None})
  write_atomically(path, image.getvalue())


def _draw_panel(
  ax: Axes, label: str, series: _Series, colors: Mapping[str, str]
) -> None:
  """Draw a panel, each group (train, test, ...) in its color of `colors`."""
  from matplotlib.ticker import MaxNLocator

  used: collections.Counter[str] = collections.Counter()
  for key, (rounds, values) in series.items():
    group = _group(key)
    ax.plot(
      rounds,
      np.asarray(values, float),  # None becomes NaN: a gap
      label=key,
      color=colors[group],
      linestyle=_STYLES[used[group] % len(_STYLES)],
      linewidth=1.6,
      marker="o" if len(rounds) <= _FEW else None,
      markersize=4,
    )
    used[group] += 1
  if series:
    ax.legend(frameon=False)
  ax.set_xlim(left=0)
  ax.set_xlabel("Round")
  ax.set_ylabel(label)
  ax.xaxis.set_major_locator(
    MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
  )
  ax.grid(alpha=0.3)
  ax.spines[["top", "right"]].set_visible(False)


def _ending(series: _Series, word: str) -> _Series:
  return {
    key: value
    for key, value in series.items()
    if key.removesuffix("/mean").endswith(word)
  }


def _group(key: str) -> str:
  return key.split("/")[0]
