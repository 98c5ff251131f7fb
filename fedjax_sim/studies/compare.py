"""`compare`: from folders of runs to how their settings differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedjax_sim.core import validate
from fedjax_sim.studies.compared_runs import (
  CompareError,
  check_baseline,
  check_metric,
  check_seeds,
  read_runs,
  settings_of,
)
from fedjax_sim.studies.comparison import (
  BEST,
  LAST,
  Comparison,
  compare_settings,
  direction_of,
)
from fedjax_sim.studies.comparison_files import check_folder, write_files
from fedjax_sim.studies.record import read_study


def compare(
  folders: Sequence[str | os.PathLike[str]],
  metric: str | None = None,
  *,
  at: str | int = LAST,
  target: float | None = None,
  higher_is_better: bool | None = None,
  baseline: str | None = None,
  confidence: float = 0.95,
  to: str | os.PathLike[str] | None = None,
) -> Comparison:
  """Compare the settings of runs, paired over the seeds that they share.

  Runs are of one setting if their configs differ in seeds alone. Means are
  over the seeds of a setting; a difference is within each seed, and its
  intervals and its test are of those differences. Nothing is trained.

  Args:
    folders: workdirs of runs, or folders of studies.
    metric: a column of `metrics.jsonl`; None: that of the first study among
      them, else "test/accuracy".
    at: which value of a run counts: its "last", its "best", which flatters all
      settings, or that of a round. But for a round, runs count if they are
      finished.
    target: a value of the metric to count rounds and bytes to; None: 95 % of
      the best setting's mean, or 105 % where lower is better.
    higher_is_better: of a metric whose name does not say it, nor a study.
    baseline: label of a setting, to compare all others with, or "best"; None:
      all pairs.
    confidence: of the intervals.
    to: folder for tables, curves and a page; made if missing. None: no files.

  Raises:
    CompareError: runs that cannot be compared.
    NoRunError: a folder holds no run, or damaged files.
    UnknownNameError: no run has such a metric; no setting is the baseline.
    TypeError, ValueError: an argument is out of range.
    OSError: a file cannot be read or written.

  Example:
    found = fs.compare(["runs/fedavg-0", "runs/fedavg-1", "runs/fedprox-0",
                        "runs/fedprox-1"])
    found.pairs[0].difference.interval
  """
  confidence = validate.number("confidence", confidence, gt=0, lt=1)
  if isinstance(at, str):
    validate.one_of("at", at, (LAST, BEST))
  else:
    at = validate.integer("at", at, ge=0)
  if target is not None:
    target = validate.number("target", target)
  if to is not None:
    check_folder(to)
  notes: list[str] = []
  runs = read_runs(folders, notes)
  if not runs:
    raise CompareError(f"compare: nothing to compare. {' '.join(notes)}")
  metric, told = _metric_of(folders, metric)
  higher_is_better = told if higher_is_better is None else higher_is_better
  check_metric(metric, runs)
  higher = direction_of(metric, higher_is_better)
  settings = settings_of(runs)
  check_seeds(settings)
  check_baseline(baseline, settings)
  found = compare_settings(
    settings, metric, at, target, higher, baseline, confidence
  )
  comparison = found._replace(notes=[*notes, *found.notes])
  if to is not None:
    write_files(comparison, to)
  return comparison


def _metric_of(
  folders: Sequence[str | os.PathLike[str]], metric: str | None
) -> tuple[str, bool | None]:
  """Return the metric to compare by, and its direction, if a study says it."""
  for folder in folders:
    study = read_study(Path(folder).expanduser())
    if study is not None and metric in (None, study["metric"]):
      return study["metric"], study["higher_is_better"]
  return metric or "test/accuracy", None
