"""Learning curves of settings: means over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedjax_sim.core.files import PathLike
from fedjax_sim.reporting.figures.bands import MOST_BANDS, Band, draw_bands
from fedjax_sim.reporting.figures.curves import new_figure
from fedjax_sim.reporting.figures.overlay import short_name
from fedjax_sim.reporting.figures.png import write_png
from fedjax_sim.reporting.figures.series import line_of
from fedjax_sim.reporting.figures.style import SCREEN
from fedjax_sim.studies.comparison import Comparison, SettingResult
from fedjax_sim.studies.statistics import Interval, mean_interval, spread

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Of each seed, the finite values by their rounds.
_Series = Mapping[int, Mapping[int, float]]


def draw_means(ax: Axes, comparison: Comparison) -> None:
  """Draw mean ± standard deviation over seeds, of the best settings.

  A curve is of the setting's runs that count, or of all if none does, and goes
  as far as all of those have the metric.
  """
  bands = [
    _band(result.label, i, _series(result, comparison.metric), _deviation)
    for i, result in enumerate(comparison.settings[:MOST_BANDS])
  ]
  draw_bands(ax, bands, comparison.metric)


def draw_differences(ax: Axes, comparison: Comparison) -> None:
  """Draw paired differences from one setting, with their t intervals.

  Those of the settings of `draw_means` from the baseline, or else the best.
  """
  base = reference_of(comparison)
  compared = {frozenset((pair.a, pair.b)) for pair in comparison.pairs}
  other = _series(base, comparison.metric)
  around = lambda values: mean_interval(values, comparison.confidence)
  bands = []
  for i, result in enumerate(comparison.settings[:MOST_BANDS]):
    if {result.label, base.label} not in compared:
      continue
    series = _series(result, comparison.metric)
    paired = {
      seed: {
        r: series[seed][r] - x
        for r, x in other[seed].items()
        if r in series[seed]
      }
      for seed in series.keys() & other.keys()
    }
    bands.append(_band(result.label, i, paired, around))
  draw_bands(ax, bands, f"{comparison.metric}, difference", zero=True)


def reference_of(comparison: Comparison) -> SettingResult:
  """Return the setting that curves show differences from."""
  label = comparison.baseline or comparison.settings[0].label
  return next(r for r in comparison.settings if r.label == label)


def write_curves(comparison: Comparison, path: PathLike) -> None:
  """Write both pictures beside each other as a PNG; replaced atomically.

  Raises:
    OSError: the file cannot be written.
  """
  figure = new_figure(2, SCREEN)
  left, right = figure.subplots(1, 2)
  draw_means(left, comparison)
  left.set_title("Mean ± standard deviation over seeds", fontsize=10)
  draw_differences(right, comparison)
  base = short_name(reference_of(comparison).label, 44)
  right.set_title(
    f"Paired difference from {base}, {100 * comparison.confidence:g} %",
    fontsize=10,
    parse_math=False,
  )
  write_png(figure, path)


def _series(result: SettingResult, metric: str) -> dict[int, dict[int, float]]:
  counted = [run for run in result.runs if run.seed in result.seeds]
  series = {}
  for run in counted or result.runs:
    line = line_of(run.rows, metric)
    finite = np.isfinite(line.values)
    rounds, values = line.rounds[finite], line.values[finite]
    series[run.seed] = dict(zip(rounds.tolist(), values.tolist(), strict=True))
  return series


def _band(
  name: str,
  color: int,
  series: _Series,
  around: Callable[[np.ndarray], Interval],
) -> Band:
  """Return the mean of series over the rounds that all of them have.

  Args:
    name: of the curve.
    color: its number.
    series: of each seed.
    around: values of a round, shape=(seeds,) -> the ends of its band.
  """
  each = [*series.values()]
  rounds = sorted(
    set[int].intersection(*(set(s) for s in each)) if each else []
  )
  values = np.asarray([[s[r] for r in rounds] for s in each], np.float64)
  columns = values.T if len(rounds) else np.empty((0, 1))
  ends = [around(column) for column in columns]
  return Band(
    name=name,
    color=color,
    rounds=np.asarray(rounds, int),
    middle=columns.mean(axis=1),
    low=np.asarray([low for low, _ in ends], np.float64),
    high=np.asarray([high for _, high in ends], np.float64),
  )


def _deviation(values: np.ndarray) -> Interval:
  middle, std = float(values.mean()), spread(values)
  return Interval(middle - std, middle + std)
