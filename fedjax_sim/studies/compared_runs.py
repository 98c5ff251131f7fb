"""Runs to compare, and the settings that they are of.

A setting is what a config says but for its seeds, for where things lie, and for
what changes no number but by rounding. Of a study it is a point.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fedjax_sim.config import fields_of
from fedjax_sim.core import urls, validate
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.data import workdir_on_disk
from fedjax_sim.reporting import NoRunError
from fedjax_sim.reporting.figures.series import line_of
from fedjax_sim.reporting.metrics_file import Row
from fedjax_sim.reporting.pages.one_run import shown
from fedjax_sim.reporting.pages.record import (
  RunOutcome,
  read_outcome,
  read_profile,
)
from fedjax_sim.run.changes import FREE, ORIGIN, ROUNDS, decisive
from fedjax_sim.studies.record import STUDY_FILE, read_study

FINISHED, UNFINISHED = "finished", "unfinished"
_SEEDS = ("seed", "privacy.noise_seed")
_PRECISIONS = ("runtime.compute_dtype", "runtime.frozen_dtype")
_PARTITION_SEED, _PLACE = "data.seed", "data.path"
_LONG = 60  # letters of a value in a label


class CompareError(FedjaxSimError, ValueError):
  """Runs cannot be compared."""


class ComparedRun(NamedTuple):
  """A run to compare.

  Attributes:
    folder: its workdir.
    seed: of cohorts, batches and initial parameters.
    status: "finished", "unfinished", or what a study says.
    fields: "section.field" -> value, of its whole config.
    point: "section.field" -> value, of those that its study varies; None
      outside of one.
    rows: of `metrics.jsonl`.
    profile: of `data_profile.json`; None: there is none.
    data_digest: of its data; None: it is not known, as of a private run.
  """

  folder: Path
  seed: int
  status: str
  fields: Mapping[str, Any]
  point: Mapping[str, Any] | None
  rows: Sequence[Row]
  profile: Mapping[str, Any] | None
  data_digest: str | None

  def comparable(self, other: ComparedRun) -> bool:
    """Return whether both were evaluated on the same data set."""
    if self.fields["data.name"] != other.fields["data.name"]:
      return False
    if self.profile is None or other.profile is None:
      return True
    names = ("classes", "test")
    return all(self.profile.get(n) == other.profile.get(n) for n in names)


class Setting(NamedTuple):
  """Runs that differ in their seeds alone.

  Attributes:
    label: names it, in a few words.
    fields: "section.field" -> value, of those in which settings differ; one
      that its config does not have is missing.
    runs: one a seed, in the order of the seeds.
  """

  label: str
  fields: Mapping[str, Any]
  runs: Sequence[ComparedRun]


def read_runs(
  folders: Sequence[str | os.PathLike[str]], notes: list[str]
) -> list[ComparedRun]:
  """Return the runs of workdirs and of studies.

  Args:
    folders: workdirs, and folders of studies.
    notes: gets a line for what is left out.

  Raises:
    CompareError: a folder is given twice, or there is none.
    NoRunError: a folder is neither a workdir nor a study, or damaged.
    OSError: a file cannot be read.
  """
  if not folders:
    raise CompareError(
      "compare: no folder is given; name the workdirs of runs, or a study's"
      " folder."
    )
  places: dict[Path, ComparedRun] = {}
  for given in folders:
    folder = workdir_on_disk(given, "compare")
    found = (
      _of_study(folder, notes) if is_study(folder) else [_of_workdir(folder)]
    )
    for run in found:
      place = run.folder.resolve()
      if place in places:
        raise CompareError(f"{run.folder} is given twice; name each run once.")
      places[place] = run
  runs = [*places.values()]
  _check_data(runs)
  return runs


def is_study(folder: Path) -> bool:
  """Return whether a folder holds a study."""
  return (folder / STUDY_FILE).exists()


def _of_workdir(folder: Path) -> ComparedRun:
  if not folder.is_dir():
    kind = "a file" if folder.exists() else "not there"
    raise NoRunError(
      f"compare: {folder} is {kind}; name the workdir of a run, or a study's"
      " folder."
    )
  if not (folder / "config.json").exists() and [*folder.glob("*/config.json")]:
    raise NoRunError(
      f"compare: {folder} is no run, but holds some; name them: {folder}/*"
    )
  outcome = read_outcome(folder)
  done = UNFINISHED if outcome.summary is None else FINISHED
  return _compared(folder, outcome, done, None)


def _of_study(folder: Path, notes: list[str]) -> list[ComparedRun]:
  study = read_study(folder)
  assert study is not None
  listed = [(r["name"], r["point"], r["status"]) for r in study["runs"]]
  fields = study["fields"]
  runs, absent = [], []
  for name, point, status in listed:
    workdir = folder / "runs" / name
    begun = (workdir / "metrics.jsonl").exists()
    if not (workdir / "config.json").exists() or (
      not begun and status != FINISHED
    ):
      absent.append(name)
      continue
    varied = {field: point[field] for field in fields if field in point}
    runs.append(_compared(workdir, read_outcome(workdir), status, varied))
  if absent:
    notes.append(
      f"{len(absent)} of {len(listed)} runs of {folder} have not begun:"
      f" {_listed(absent)}."
    )
  return runs


def _compared(
  folder: Path,
  outcome: RunOutcome,
  status: str,
  point: Mapping[str, Any] | None,
) -> ComparedRun:
  config = dict(outcome.config)
  origin = config.pop(ORIGIN, None)
  # Trackers explain nothing, and what is secret must not be shown.
  config = urls.without_secrets(decisive(config))
  fields = dict(fields_of(ConfigDict(config)))
  if origin is not None:
    fields["origin.round"] = origin["round"]
  return ComparedRun(
    folder=folder,
    seed=int(fields["seed"]),
    status=status,
    fields=fields,
    point=point,
    rows=outcome.rows,
    profile=read_profile(folder, []),
    data_digest=(outcome.summary or {}).get("data_digest"),
  )


def _check_data(runs: Iterable[ComparedRun]) -> None:
  """Refuse runs of one and the same config of data, but of other data."""
  seen: dict[str, ComparedRun] = {}
  for run in runs:
    data = {
      name: value
      for name, value in run.fields.items()
      if name.startswith("data.") and name != _PLACE
    }
    key = json.dumps(data, sort_keys=True)
    first = seen.setdefault(key, run)
    pairs = [
      (first.profile, run.profile),
      (first.data_digest, run.data_digest),
    ]
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
      raise CompareError(
        f"{first.folder} and {run.folder} have trained on different data,"
        " though their configs name the same: what data.path or"
        " FEDJAX_SIM_DATA names has changed in between; compare runs of the"
        " same data."
      )


def settings_of(runs: Sequence[ComparedRun]) -> list[Setting]:
  """Return the settings that runs are of, by the order of their labels.

  Args:
    runs: at least one.

  Raises:
    CompareError: two runs of a setting have the same seed.
  """
  described = _varied(runs)
  groups: dict[str, list[int]] = {}
  for i, fields in enumerate(described):
    groups.setdefault(json.dumps(fields, sort_keys=True), []).append(i)
  labels = labels_of([described[group[0]] for group in groups.values()])
  settings = []
  for label, group in zip(labels, groups.values(), strict=True):
    by_seed: dict[int, ComparedRun] = {}
    for i in group:
      other = by_seed.setdefault(runs[i].seed, runs[i])
      if other is not runs[i]:
        raise CompareError(
          f"{other.folder} and {runs[i].folder} are runs of the same setting"
          f" and the same seed, {other.seed}; name one of them."
        )
    ordered = [by_seed[seed] for seed in sorted(by_seed)]
    settings.append(Setting(label, described[group[0]], ordered))
  return sorted(settings, key=lambda setting: setting.label)


def _varied(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
  """Return the fields of each run in which settings differ."""
  points = [run.point for run in runs if run.point is not None]
  same = {tuple(point) for point in points}
  if len(points) == len(runs) and len(same) == 1:
    return [dict(point) for point in points]
  names = dict.fromkeys(name for run in runs for name in run.fields)
  seeds = {(run.seed, run.fields.get(_PARTITION_SEED)) for run in runs}
  by_seed = len(seeds) == len({run.seed for run in runs})
  compared = [name for name in names if _decides(name, by_seed=by_seed)]
  text = lambda run, name: json.dumps(run.fields.get(name), sort_keys=True)
  differ = [
    name for name in compared if len({text(run, name) for run in runs}) > 1
  ]
  return [
    {name: run.fields[name] for name in differ if name in run.fields}
    for run in runs
  ]


def _decides(name: str, *, by_seed: bool) -> bool:
  """Return whether a field tells settings apart.

  Args:
    name: "section.field".
    by_seed: whether data are partitioned anew for each seed, and for all
      settings alike.
  """
  if name in _SEEDS or name == _PLACE or (name == _PARTITION_SEED and by_seed):
    return False
  if name.startswith("runtime."):  # numbers follow it by rounding alone
    return name in _PRECISIONS
  return name == ROUNDS or name not in FREE


def labels_of(settings: Sequence[Mapping[str, Any]]) -> list[str]:
  """Return a short name for each setting; all are different.

  Fields that only some settings have, such as options of one algorithm, are
  left out where the others suffice.

  Args:
    settings: field -> value of each; no two are equal.

  Example:
    labels_of([{"algorithm.name": "fedavg"}, {"algorithm.name": "fedprox"}])
  """
  names = list(dict.fromkeys(name for fields in settings for name in fields))
  if not names:  # a single one
    return ["all runs"]
  common = [n for n in names if all(n in fields for fields in settings)]
  for chosen in (common, names):
    keys = {name: _short_key(name, chosen) for name in chosen}
    labels = [
      ", ".join(_worded(keys[n], fields[n]) for n in chosen if n in fields)
      or f"without {', '.join(chosen)}"
      for fields in settings
    ]
    if len(set(labels)) == len(labels):
      return labels
  return [f"{label} ({i})" for i, label in enumerate(labels, 1)]


def _short_key(name: str, names: Sequence[str]) -> str:
  """Return what a label calls a field; "" where its value says it all."""
  key = name.rpartition(".")[2]
  alike = sum(other.rpartition(".")[2] == key for other in names)
  if key == "name" and (alike == 1 or name == "algorithm.name"):
    return ""
  return key if alike == 1 else name


def _worded(key: str, value: Any) -> str:
  text = shown(value)
  if isinstance(value, str) and "," in text and text[:1] != "(":
    text = f"({text})"  # a comma parts the fields of a label
  if len(text) > _LONG:
    text = f"{text[: _LONG // 2]}...{text[-_LONG // 2 :]}"
  return f"{key}={text}" if key else text


def _listed(names: Sequence[str], most: int = 5) -> str:
  """Return names, the first ones of many."""
  more = f", and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def check_seeds(settings: Sequence[Setting]) -> None:
  """Refuse settings of which no two have a seed in common.

  Raises:
    CompareError: there are less than two settings, or no common seed.
  """
  if len(settings) < 2:
    (setting,) = settings
    raise CompareError(
      f"compare: all {len(setting.runs)} runs are of the same setting; name"
      " runs of at least two, that differ in more than their seeds."
    )
  seeds = [{run.seed for run in setting.runs} for setting in settings]
  if not any(a & b for i, a in enumerate(seeds) for b in seeds[:i]):
    told = "; ".join(
      f"{setting.label}: {_listed([str(s) for s in sorted(have)])}"
      for setting, have in zip(settings, seeds, strict=True)
    )
    raise CompareError(
      f"compare: no two settings have a seed in common ({told}); run both with"
      " the same --config.seed."
    )


def check_metric(metric: str, runs: Sequence[ComparedRun]) -> None:
  """Refuse a metric that no run has.

  Raises:
    UnknownNameError: names the nearest one.
  """
  known = {key for run in runs for row in run.rows for key in row}
  known.discard("round")
  validate.one_of("metric", metric, known)


def how_far(runs: Sequence[ComparedRun], metric: str) -> tuple[int, float]:
  """Return the most rounds of some runs, and the mean of their last values.

  Args:
    runs: of a setting.
    metric: whose values; NaN if no run has it.
  """
  rounds = max(
    (int(run.rows[-1]["round"]) for run in runs if run.rows), default=0
  )
  lines = [line_of(run.rows, metric).values for run in runs]
  last = [float(values[-1]) for values in lines if len(values)]
  return rounds, sum(last) / len(last) if last else math.nan


def check_baseline(baseline: str | None, settings: Sequence[Setting]) -> None:
  """Refuse a baseline that is no setting's label, nor "best".

  Raises:
    UnknownNameError: names the nearest one, and all others in quotes, as labels
      have commas.
  """
  labels = [setting.label for setting in settings]
  if baseline is None or baseline in ("best", *labels):
    return
  near = difflib.get_close_matches(baseline, labels, n=1, cutoff=0.5)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  known = _listed(list(map(repr, labels)), 20)
  raise UnknownNameError(
    f"baseline={baseline!r} is no setting's label.{hint} Known: 'best',"
    f" {known}."
  )
