"""`privacy.png` and `privacy.csv`: epsilon, noise and cohorts before a run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedjax_sim.core.files import write_atomically
from fedjax_sim.reporting.figures.png import write_png

if TYPE_CHECKING:
  from matplotlib.axes import Axes


class Setting(NamedTuple):
  """The settings of a run, and its cost."""

  rounds: int
  clients_per_round: int
  noise_multiplier: float
  epsilon: float
  mean_cohort: float

  @property
  def noise_std(self) -> float:
    """Noise's standard deviation on the mean update, over the clip norm."""
    return self.noise_multiplier / self.mean_cohort


def draw_privacy_curves(
  by_round: Sequence[Setting],
  by_cohort: Sequence[Setting],
  path: str | os.PathLike[str],
  title: str,
) -> None:
  """Draw a PNG of epsilon against rounds, and of noise against cohorts.

  Args:
    by_round: settings that differ in their rounds.
    by_cohort: settings of one epsilon that differ in their cohorts.
    path: the file; replaced atomically.
    title: stands above the panels.

  Raises:
    OSError: the file cannot be written.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4.2), dpi=120)
  figure.set_layout_engine("constrained", wspace=0.06)
  figure.suptitle(title, parse_math=False, fontsize=10)
  left, right = figure.subplots(1, 2)
  _draw_rounds(left, by_round)
  _draw_cohorts(right, by_cohort)
  write_png(figure, path)


def _draw_rounds(ax: Axes, settings: Sequence[Setting]) -> None:
  # Between counted rounds the later one's epsilon: no less than the truth.
  rounds, epsilons = zip(
    *((s.rounds, s.epsilon) for s in settings), strict=True
  )
  ax.plot(rounds, epsilons, linewidth=1.6, drawstyle="steps-pre")
  ax.set_title(
    f"{settings[0].clients_per_round:,} clients a round, noise multiplier"
    f" {settings[0].noise_multiplier:g}",
    fontsize=9,
  )
  ax.set_xlabel("Round")
  ax.set_ylabel("Epsilon")
  ax.set_xlim(left=0)
  ax.set_ylim(bottom=0)
  _finish(ax)


def _draw_cohorts(ax: Axes, settings: Sequence[Setting]) -> None:
  sizes = [s.clients_per_round for s in settings]
  for values, label in (
    ([s.noise_multiplier for s in settings], "noise multiplier"),
    ([s.noise_std for s in settings], "noise on the mean / clip norm"),
  ):
    ax.plot(sizes, values, label=label, linewidth=1.6, marker="o", markersize=4)
  ax.set_title(
    f"epsilon {settings[0].epsilon:.3g} after {settings[0].rounds:,} rounds",
    fontsize=9,
  )
  ax.set_xscale("log")
  ax.set_yscale("log")
  ax.set_xlabel("Clients a round")
  ax.set_ylabel("Noise")
  ax.legend(frameon=False)
  _finish(ax)


def _finish(ax: Axes) -> None:
  ax.grid(alpha=0.3)
  ax.spines[["top", "right"]].set_visible(False)


def write_privacy_curves(
  by_round: Sequence[Setting],
  by_cohort: Sequence[Setting],
  path: str | os.PathLike[str],
) -> None:
  """Write the numbers of `draw_privacy_curves` as lines of a CSV file.

  Args:
    by_round: as in `draw_privacy_curves`.
    by_cohort: as in `draw_privacy_curves`.
    path: the file; replaced atomically.

  Raises:
    OSError: the file cannot be written.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["curve", *Setting._fields, "noise_std"])
  for name, settings in (("rounds", by_round), ("cohorts", by_cohort)):
    writer.writerows([name, *s, s.noise_std] for s in settings)
  write_atomically(path, text.getvalue().encode())
