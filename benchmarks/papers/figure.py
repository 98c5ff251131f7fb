"""What a figure of a paper is made of, and how its runs are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks.points import studied
from fedjax_sim.studies.results import Study


class Row(NamedTuple):
  """A number that a paper prints, and ours.

  Attributes:
    what: of which setting it is.
    printed: as the paper has it.
    ours: one a seed, in the paper's unit.
    digits: after the point.
  """

  what: str
  printed: str
  ours: Sequence[float]
  digits: int = 1


class Scale(NamedTuple):
  """How much is trained.

  Attributes:
    seeds: how many.
    rounds: of every run; None: as many as the figure takes.
  """

  seeds: int = 5
  rounds: int | None = None


class Figure(NamedTuple):
  """Numbers of one paper.

  Attributes:
    source: the paper, and where in it.
    rows: (folder for studies, scale) -> the numbers.
    differs: what is not as in the paper.
  """

  source: str
  rows: Callable[[Path, Scale], list[Row]]
  differs: str


class Trained(NamedTuple):
  """A study, and the names of its runs: a list for each point."""

  study: Study
  names: list[list[str]]

  def last(self, point: int, metric: str, unit: float = 100) -> list[float]:
    """Return a metric's last value of each run of a point, in percent."""
    return [unit * self.study.last(n)[metric] for n in self.names[point]]

  def curves(self, point: int, metric: str) -> list[list[float]]:
    """Return a metric's values of each run of a point, evaluation by one."""
    return [
      [row[metric] for row in self.study.metrics(name) if metric in row]
      for name in self.names[point]
    ]


def train(
  config: ConfigDict,
  folder: Path,
  points: Sequence[Mapping[str, Any]],
  seeds: Sequence[int],
  scale: Scale,
  metric: str,
) -> Trained:
  """Train all points with all seeds, as a study.

  Args:
    config: what they have in common.
    folder: of the study.
    points: field -> value; those of a point that another lacks are None there.
    seeds: of the runs.
    scale: its rounds replace the config's.
    metric: which the study shows.
  """
  config.trackers.tensorboard = None
  config.runtime.checkpoint_every = 50
  if scale.rounds is not None:
    config.server.rounds = scale.rounds
  config.server.eval_every = min(config.server.eval_every, config.server.rounds)
  named = dict(enumerate(points))
  study, names = studied(config, folder, named, seeds, metric)
  return Trained(study, [*names.values()])
