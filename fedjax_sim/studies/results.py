"""What a study found: its runs, and their metrics by setting."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.core.files import write_atomically
from fedjax_sim.reporting import NoRunError, read_metrics
from fedjax_sim.studies.compare import compare
from fedjax_sim.studies.compared_runs import CompareError
from fedjax_sim.studies.comparison import BEST
from fedjax_sim.studies.comparison_files import PAGE, write_files
from fedjax_sim.studies.record import read_study

MOST_PAIRED = 12  # settings; of more, all are compared with the best alone


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
  """A study as its folder holds it, finished or not.

  Attributes:
    folder: the study's.
    fields: those that are varied.
    runs: of each run `name`, `point`, `seed`, `program`, `status`, `reason`
      and `rounds`, as in `study.json`.
    metric: by which settings are compared.
    higher_is_better: its direction.
  """

  folder: Path
  fields: Sequence[str]
  runs: Sequence[Mapping[str, Any]]
  metric: str
  higher_is_better: bool

  def metrics(self, name: str) -> list[dict[str, float]]:
    """Return the rows of metrics of a run, by its name.

    Raises:
      UnknownNameError: there is no such run.
    """
    names = [run["name"] for run in self.runs]
    validate.one_of("run", name, names)
    path = self.folder / "runs" / name / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []

  def last(self, name: str) -> dict[str, float]:
    """Return the newest value of each metric of a run."""
    found: dict[str, float] = {}
    for row in self.metrics(name):
      found |= row
    return found

  def settings(self) -> list[dict[str, Any]]:
    """Return one row for each setting, the best by `metric` first.

    Returns:
      Of each its fields, and `runs`, how many there are; `finished`, how many
      of them; `rounds`, the fewest that one did; `mean` and `std` (of a sample;
      NaN of a single run) of the last value of the metric over the finished
      ones; of a setting that ended early, over those that did not diverge.
      Settings of more rounds come first.
    """
    by_point: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for run in self.runs:
      key = tuple(run["point"].values())
      by_point.setdefault(key, []).append(run)
    rows = []
    for members in by_point.values():
      finished = [run for run in members if run["status"] == "finished"]
      counted = finished or [
        run for run in members if run["status"] != "diverged"
      ]
      values = np.array(
        [self.last(r["name"]).get(self.metric, math.nan) for r in counted]
      )
      rows.append(
        {
          **members[0]["point"],
          "runs": len(members),
          "finished": len(finished),
          "rounds": min((run["rounds"] for run in counted), default=0),
          "mean": float(values.mean()) if len(values) else math.nan,
          "std": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        }
      )
    sign = -1.0 if self.higher_is_better else 1.0
    order = lambda row: (
      math.isnan(row["mean"]),
      -row["rounds"],
      sign * row["mean"],
    )
    return sorted(rows, key=order)

  def table(self) -> str:
    """Return the settings as a table for the screen."""
    rows = self.settings()
    heads = [*self.fields, self.metric, "rounds", "runs"]
    cells = [
      [
        *(row[field] for field in self.fields),
        _mean(row["mean"], row["std"]),
        str(row["rounds"]),
        str(row["runs"])
        if row["finished"] == row["runs"]
        else f"{row['finished']} of {row['runs']} finished",
      ]
      for row in rows
    ]
    return aligned([heads, *cells])


def sum_up(folder: Path, metric: str, higher_is_better: bool) -> Study:
  """Write `study.csv`, a line a run.

  Args:
    folder: of the study.
    metric: by which settings are compared.
    higher_is_better: its direction.
  """
  found = read_study(folder)
  assert found is not None
  by = metric, higher_is_better
  study = Study(folder, found["fields"], found["runs"], *by)
  last = {run["name"]: study.last(run["name"]) for run in study.runs}
  names = dict.fromkeys(
    name for row in last.values() for name in row if name != "round"
  )
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  facts = ("status", "rounds")
  writer.writerow(["run", *study.fields, "seed", *facts, *names])
  for run in study.runs:
    values = [last[run["name"]].get(name, "") for name in names]
    writer.writerow(
      [
        run["name"],
        *run["point"].values(),
        run["seed"],
        *(run[fact] for fact in facts),
        *values,
      ]
    )
  write_atomically(folder / "study.csv", text.getvalue().encode())
  return study


def show(study: Study) -> None:
  """Print the settings, and compare them in tables, curves and a page.

  Args:
    study: finished or not; what is not does not count.
  """
  print(study.table())  # noqa: T201
  if sum(row["finished"] > 0 for row in study.settings()) < 2:
    return  # nothing to compare
  many = len(study.settings()) > MOST_PAIRED
  write_comparison(study, BEST if many else None)


def write_comparison(study: Study, baseline: str | None) -> None:
  """Write tables, curves and a page, and print where, or why there are none.

  Args:
    study: whose settings are compared.
    baseline: as `compare` has it.
  """
  folder, metric = study.folder, study.metric
  try:
    comparison = compare(
      [folder],
      metric,
      higher_is_better=study.higher_is_better,
      baseline=baseline,
    )
  except (CompareError, NoRunError) as error:  # too few are finished
    print(f"No comparison: {error}")  # noqa: T201
    return
  write_files(comparison, folder)
  print(f"Table, curves and {PAGE} are in {folder}.")  # noqa: T201


def _mean(mean: float, std: float) -> str:
  if math.isnan(mean):
    return "-"
  return f"{mean:.4f}" if math.isnan(std) else f"{mean:.4f} +- {std:.4f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Return rows of cells as lines, in columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in rows
  ]
  return "\n".join(line.rstrip() for line in lines)
