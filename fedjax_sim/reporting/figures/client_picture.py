"""`clients.png`: how many examples clients have, and of which classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedjax_sim.reporting.figures.png import write_png

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MOST_BARS = 60  # clients whose classes are drawn
MOST_NAMES = 16  # clients who have bars of their own, with their names
_NAMED = 20  # classes that a legend names
_APART = 0.7  # width of bars that do not touch
_LONGEST = 24  # letters of a name that are shown
_ACROSS = 40  # letters that fit below a panel


def draw_clients(
  sizes: np.ndarray,
  shown: np.ndarray,
  counts: np.ndarray | None,
  path: str | os.PathLike[str],
  title: str,
  names: Sequence[str] | None = None,
) -> None:
  """Draw a PNG of clients' sizes, and of the classes of some of them.

  Args:
    sizes: shape=(clients,), integer; examples of every client.
    shown: shape=(n,); the clients of the right panel, at most `MOST_BARS`.
    counts: shape=(n, classes); their examples of each class; None: there are no
      classes, and no right panel.
    path: the file; replaced atomically.
    title: stands above the panels.
    names: of all clients, which then have a bar each, with its name below;
      None: they are too many for that.

  Raises:
    OSError: the file cannot be written.
  """
  write_png(clients_figure(sizes, shown, counts, title, names), path)


def clients_figure(
  sizes: np.ndarray,
  shown: np.ndarray,
  counts: np.ndarray | None,
  title: str,
  names: Sequence[str] | None = None,
) -> Figure:
  """Return the figure of `draw_clients`, whose arguments these are."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  panels = 1 if counts is None else 2
  figure = Figure(figsize=(5.5 * panels, 4.2), dpi=120)
  figure.set_layout_engine("constrained", wspace=0.06)
  FigureCanvasAgg(figure)
  figure.suptitle(title, parse_math=False, fontsize=10)
  left, *right = np.atleast_1d(figure.subplots(1, panels)).tolist()
  draw_sizes(left, sizes, names)
  for ax in right:
    assert counts is not None
    draw_classes(ax, len(sizes), counts, names)
  return figure


def draw_sizes(
  ax: Axes, sizes: np.ndarray, names: Sequence[str] | None = None
) -> None:
  """Draw how many examples clients have: the left panel of `draw_clients`."""
  from matplotlib.ticker import MaxNLocator

  if names is None:
    _draw_histogram(ax, sizes)
  else:
    ax.bar(np.arange(len(sizes)), sizes, _APART)
    ax.set_ylabel("Examples")
    _name(ax, names)
  ax.yaxis.set_major_locator(MaxNLocator(integer=True))
  ax.spines[["top", "right"]].set_visible(False)


def draw_classes(
  ax: Axes,
  num_clients: int,
  counts: np.ndarray,
  names: Sequence[str] | None = None,
) -> None:
  """Draw the classes of some clients: the right panel of `draw_clients`.

  Args:
    ax: where to.
    num_clients: all that there are.
    counts: shape=(n, classes); examples of each class.
    names: of the n clients, in their order; None: they are sorted.
  """
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import ListedColormap, Normalize

  classes = counts.shape[1]
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  order = np.lexsort((-shares.max(1), shares.argmax(1)))
  if names is not None:  # as on the left
    order = np.arange(len(counts))
  base, places = np.zeros(len(counts)), np.arange(len(counts))
  edges = np.arange(len(counts) + 1) - 0.5
  for label, color in enumerate(_colors(classes)):
    top = base + shares[order, label]
    if names is None:  # one shape a class, as bars that touch would look
      ax.stairs(
        *(top, edges),
        baseline=base,
        fill=True,
        facecolor=color,
        label=str(label),
      )
    else:
      ax.bar(places, top - base, _APART, base, color=color, label=str(label))
    base = top
  if classes <= _NAMED:
    ax.legend(
      title="Class", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7
    )
  else:
    scale = ScalarMappable(
      Normalize(-0.5, classes - 0.5), ListedColormap(_colors(classes))
    )
    ax.figure.colorbar(scale, ax=ax, label="Class")
  if names is None:
    ax.set_xlabel(
      f"{len(counts):,} of {num_clients:,} clients, by their most frequent"
      " class"
    )
    ax.set_xticks([])
  else:
    _name(ax, names)
  ax.set_ylabel("Share of each class")
  ax.set_ylim(0, 1)
  ax.spines[["top", "right"]].set_visible(False)


def _draw_histogram(ax: Axes, sizes: np.ndarray) -> None:
  """Draw how many clients have how many examples."""
  from matplotlib.ticker import MaxNLocator

  most = int(sizes.max())
  bins = np.unique(np.geomspace(1, most + 1, 40).astype(int))
  ax.hist(sizes, bins=bins.tolist() if len(bins) > 1 else 10)
  if most > 50:
    ax.set_xscale("log")
  else:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.set_xlabel("Examples of a client")
  ax.set_ylabel("Clients")


def _name(ax: Axes, names: Sequence[str]) -> None:
  """Write a name below each bar, aslant if they would not fit."""
  half = _LONGEST // 2 - 1
  told = [
    name if len(name) <= _LONGEST else f"{name[:half]}...{name[-half:]}"
    for name in names
  ]
  ax.set_xticks(np.arange(len(told)), told, parse_math=False, fontsize=8)
  if sum(map(len, told)) > _ACROSS:
    for label in ax.get_xticklabels():
      label.set(rotation=35, horizontalalignment="right")


def _colors(classes: int) -> np.ndarray:
  """Return a color for every class, shape=(classes, 4); at most 256 differ."""
  from matplotlib import colormaps

  name = "tab20" if classes <= _NAMED else "turbo"
  return colormaps[name].resampled(classes)(np.arange(classes))
