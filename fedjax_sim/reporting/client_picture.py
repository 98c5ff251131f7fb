"""`clients.png`: how many examples clients have, and of which classes."""

from __future__ import annotations

import io
import os

import numpy as np

from fedjax_sim.reporting.atomic import write_atomically

MOST_BARS = 60  # clients whose classes are drawn
_NAMED = 20  # classes that a legend names


def draw_clients(
  sizes: np.ndarray,
  shown: np.ndarray,
  counts: np.ndarray | None,
  path: str | os.PathLike[str],
  title: str,
) -> None:
  """Draws a PNG of clients' sizes, and of the classes of some of them.

  Args:
    sizes: shape=(clients,), integer; examples of every client.
    shown: shape=(n,); the clients of the right panel, at most `MOST_BARS`.
    counts: shape=(n, classes); their examples of each class; None: there are no
      classes, and no right panel.
    path: the file; replaced atomically.
    title: stands above the panels.

  Raises:
    OSError: the file cannot be written.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import ListedColormap, Normalize
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  panels = 1 if counts is None else 2
  figure = Figure(figsize=(5.5 * panels, 4.2), dpi=120)
  figure.set_layout_engine("constrained", wspace=0.06)
  FigureCanvasAgg(figure)
  figure.suptitle(title, parse_math=False, fontsize=10)
  left, *right = np.atleast_1d(figure.subplots(1, panels)).tolist()
  most = int(sizes.max())
  bins = np.unique(np.geomspace(1, most + 1, 40).astype(int))
  left.hist(sizes, bins=bins if len(bins) > 1 else 10)
  if most > 50:
    left.set_xscale("log")
  else:
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
  left.set_xlabel("Examples of a client")
  left.set_ylabel("Clients")
  for ax in right:
    assert counts is not None
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    base = np.zeros(len(shown))
    for label, color in enumerate(_colors(counts.shape[1])):
      share = shares[order, label]
      ax.bar(
        np.arange(len(shown)), share, 1.0, base, color=color, label=str(label)
      )
      base += share
    if counts.shape[1] <= _NAMED:
      ax.legend(
        title="Class", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7
      )
    else:
      scale = ScalarMappable(
        Normalize(-0.5, counts.shape[1] - 0.5),
        ListedColormap(_colors(counts.shape[1])),
      )
      figure.colorbar(scale, ax=ax, label="Class")
    ax.set_xlabel(
      f"{len(shown):,} of {len(sizes):,} clients, by their most frequent class"
    )
    ax.set_ylabel("Share of each class")
    ax.set_xticks([])
    ax.set_ylim(0, 1)
  for ax in (left, *right):
    ax.spines[["top", "right"]].set_visible(False)
  image = io.BytesIO()
  figure.savefig(image, format="png", metadata={"Software": None})
  write_atomically(path, image.getvalue())


def _colors(classes: int) -> np.ndarray:
  """A colour of its own for every class, as far as 256 go; RGBA rows."""
  from matplotlib import colormaps

  name = "tab20" if classes <= _NAMED else "turbo"
  return colormaps[name].resampled(classes)(np.arange(classes))
