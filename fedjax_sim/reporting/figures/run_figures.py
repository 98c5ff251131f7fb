"""Panels of a report: clients' metrics, participation, bytes, and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedjax_sim.core import metric_names
from fedjax_sim.reporting.figures import style
from fedjax_sim.reporting.figures.series import Line, drawable

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_BINS = 20
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def draw_distribution(
  ax: Axes, metric: str, sets: Mapping[str, np.ndarray]
) -> None:
  """Draw what share of the clients has which value of a metric.

  Args:
    ax: where to.
    metric: its name.
    sets: name -> shape=(clients,); those that are not finite are left out.
  """
  finite = {k: x[np.isfinite(drawable(x))] for k, x in sets.items()}
  known = {name: x for name, x in finite.items() if len(x)}
  if known:
    both = np.concatenate([*known.values()])
    low, high = float(both.min()), float(both.max())
    if "accuracy" in metric:
      low, high = 0.0, 1.0
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
      low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    for i, (name, values) in enumerate(known.items()):
      weights = np.full(len(values), 100 / len(values))
      ax.hist(
        values,
        edges.tolist(),
        weights=weights,
        color=style.color(i),
        alpha=0.55,
        label=f"{name}, {len(values):,} clients",
      )
    ax.legend(frameon=False, fontsize=8)
  ax.set_xlabel(f"{metric_names.title(metric)} of a client")
  ax.set_ylabel("Clients, %")
  style.plain(ax)


def draw_participation(ax: Axes, counts: np.ndarray) -> None:
  """Draw how many clients took part in how many rounds.

  Args:
    ax: where to.
    counts: shape=(clients,), integer; the rounds of each.
  """
  from matplotlib.ticker import MaxNLocator

  most = int(counts.max(initial=0))
  step = max(1, -(-(most + 1) // (2 * _BINS)))
  edges = np.arange(-0.5, most + 0.5 + step, step)
  ax.hist(counts, edges.tolist(), color=style.color(0))
  for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_locator(MaxNLocator(integer=True))
  ax.set_xlabel("Rounds that a client took part in")
  ax.set_ylabel("Clients")
  style.plain(ax)


def draw_bytes(ax: Axes, lines: Mapping[str, Line]) -> None:
  """Draw the bytes that all rounds until each have sent.

  Args:
    ax: where to.
    lines: "down" and "up" -> the bytes of each round.
  """
  sums = {name: np.nancumsum(line.values) for name, line in lines.items()}
  most = max((float(x[-1]) for x in sums.values() if len(x)), default=0.0)
  unit, scale = next(((u, s) for u, s in _UNITS if most >= s), _UNITS[-1])
  for i, (name, line) in enumerate(lines.items()):
    ax.plot(
      line.rounds,
      sums[name] / scale,
      label=name,
      color=style.color(i),
      linestyle=style.LINES[i],
      marker="o" if len(line.rounds) == 1 else None,
    )
  ax.legend(frameon=False, fontsize=8)
  ax.set_ylabel(f"{unit} until this round")
  ax.set_ylim(bottom=0)
  style.against_rounds(ax)


def draw_phases(ax: Axes, seconds: Mapping[str, float]) -> None:
  """Draw a bar for each phase.

  Args:
    ax: where to.
    seconds: phase -> seconds.
  """
  names = list(seconds)
  places = np.arange(len(names))
  ax.barh(places, list(seconds.values()), color=style.color(0))
  ax.set_yticks(places, names)
  ax.invert_yaxis()
  ax.set_xlabel("Seconds")
  style.plain(ax)
  ax.grid(visible=False, axis="y")
