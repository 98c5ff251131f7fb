"""The lines of a panel: metrics against rounds, each line once.

Metrics whose values are equal share a line, which is named after both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_sim.core import metric_names
from fedjax_sim.reporting.metrics_file import Row, columns

PANELS = {"loss": "Loss", "accuracy": "Accuracy", "epsilon": "Epsilon"}
_EQUAL = 1e-6  # relative: the precision of float32


class Point(NamedTuple):
  """A value and its round."""

  round: int
  value: float


class Line(NamedTuple):
  """A line of a panel.

  Attributes:
    keys: the metrics that it shows; all have the same values.
    rounds: shape=(points,).
    values: shape=(points,); NaN is a gap.
  """

  keys: tuple[str, ...]
  rounds: np.ndarray
  values: np.ndarray

  @property
  def name(self) -> str:
    """What it shows, beside the panel's own name: "test = seen"."""
    return " = ".join(map(_short, self.keys))

  @property
  def last(self) -> Point | None:
    """The last point, which may be NaN; None if there is none."""
    if not len(self.values):
      return None
    return Point(int(self.rounds[-1]), float(self.values[-1]))

  @property
  def best(self) -> Point | None:
    """The first best point; None where no value is better or none finite."""
    higher = higher_is_better(self.keys[0])
    finite = np.isfinite(self.values)
    if higher is None or not finite.any():
      return None
    worst = -np.inf if higher else np.inf
    known = np.where(finite, self.values, worst)
    index = int(known.argmax() if higher else known.argmin())
    return Point(int(self.rounds[index]), float(self.values[index]))


def drawable(values: np.ndarray) -> np.ndarray:
  """Return the values, NaN where float32 would not hold them."""
  finite = np.abs(values) <= np.finfo(np.float32).max
  return np.where(finite, values, np.nan)


def kind(key: str) -> str | None:
  """Return the panel of a metric, such as "loss"; None: it has none.

  A metric is of a kind if its last part, or last but `/mean`, is the name of a
  known metric, such as `auc`, or ends with "loss", "accuracy" or "epsilon":
  `train/loss`, `seen/accuracy/mean`.
  """
  name = key.removesuffix("/mean")
  last = name.split("/")[-1]
  if metric_names.known(last) is not None:
    return last
  return next((word for word in PANELS if name.endswith(word)), None)


def panel_title(word: str) -> str:
  """Return what a panel is called, such as "F1 (macro)" for "f1_macro"."""
  return PANELS.get(word) or metric_names.title(word)


def in_order(words: Iterable[str]) -> list[str]:
  """Return kinds of metrics in the order of their panels, each once."""
  found = dict.fromkeys(words)
  return [w for w in PANELS if w in found] + [
    w for w in found if w not in PANELS
  ]


def higher_is_better(key: str) -> bool | None:
  """Return whether more of a metric is better; None if neither is."""
  known = metric_names.known(kind(key) or "")
  return None if known is None else known.higher_is_better


def group(key: str) -> str:
  """Return what a metric is of: `train`, `test`, `seen`, ..."""
  return key.split("/")[0]


def line_of(rows: Iterable[Row], key: str) -> Line:
  """Return the line of one metric, without points if there are none."""
  known = [row for row in rows if key in row]
  rounds = np.asarray([row["round"] for row in known], int)
  return Line((key,), rounds, np.asarray([row[key] for row in known], float))


def panels_of(rows: Iterable[Row]) -> dict[str, list[Line]]:
  """Return panel -> its lines, of the panels that have any."""
  panels: dict[str, list[Line]] = {}
  for key, (rounds, values) in columns(rows).items():
    if (word := kind(key)) is not None:
      made = Line((key,), np.asarray(rounds, int), np.asarray(values, float))
      panels.setdefault(word, []).append(made)
  return {panel_title(word): _merged(panels[word]) for word in in_order(panels)}


def groups_of(panels: Mapping[str, Sequence[Line]]) -> list[str]:
  """Return what the lines of all panels are of, in their order."""
  lines = (line for panel in panels.values() for line in panel)
  return list(dict.fromkeys(group(key) for line in lines for key in line.keys))


def _short(key: str) -> str:
  """Return "seen" for seen/loss, and "seen mean" for seen/loss/mean."""
  name, *rest = key.split("/")
  if len(rest) in (1, 2) and metric_names.known(rest[0]) is not None:
    if rest[1:] == ["mean"]:
      return f"{name} mean"
    if not rest[1:]:
      return name
  return key


def _merged(lines: Sequence[Line]) -> list[Line]:
  """Return the lines, those with equal values as one."""
  result: list[Line] = []
  for line in lines:
    for i, other in enumerate(result):
      if _equal(line, other):
        result[i] = other._replace(keys=other.keys + line.keys)
        break
    else:
      result.append(line)
  return result


def _equal(a: Line, b: Line) -> bool:
  return np.array_equal(a.rounds, b.rounds) and np.allclose(
    a.values, b.values, rtol=_EQUAL, atol=0, equal_nan=True
  )
