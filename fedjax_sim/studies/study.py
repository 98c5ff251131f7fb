"""A study: many runs of a config, as rows of a few compiled programs.

Build and check all runs, group them by program, say what will happen, compile
all programs, train, end the worst where halving is asked for, and sum up.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim.config import build
from fedjax_sim.config.build.parts import Parts
from fedjax_sim.config.completion import complete
from fedjax_sim.config.flags import UsageError
from fedjax_sim.core import urls, validate
from fedjax_sim.data.location import is_url
from fedjax_sim.reporting import read_metrics
from fedjax_sim.run.resume import warn
from fedjax_sim.run.signals import noted_signals
from fedjax_sim.run.workdir import as_write_error
from fedjax_sim.simulation.evaluator import directions
from fedjax_sim.studies import halving as halvings
from fedjax_sim.studies import influence, leave_out
from fedjax_sim.studies import points as pointed
from fedjax_sim.studies.execution import Plan, counted
from fedjax_sim.studies.folder import StudyFolder, held
from fedjax_sim.studies.leave_out import LeaveOut
from fedjax_sim.studies.results import Study, show, sum_up
from fedjax_sim.studies.runs import (
  StudyError,
  StudyRun,
  build_runs,
  by_point,
  described,
  refusal,
)

Values = str | Sequence[Any]


def study(
  config: ConfigDict,
  studydir: str | os.PathLike[str],
  *,
  vary: Mapping[str, Values] | None = None,
  points: Sequence[Mapping[str, Any]] | None = None,
  seeds: int | Sequence[int] = 1,
  random: int | None = None,
  search_seed: int = 0,
  halving: int | None = None,
  metric: str | None = None,
  shapley: int | None = None,
) -> Study:
  """Run a study in a folder, or go on with it.

  Runs that differ in seeds and numeric hyper-parameters alone are rows of one
  compiled program; others are programs of their own. A row gives what the run
  by itself gives, but for the order of float sums.

  Args:
    config: what all runs have in common.
    studydir: a folder, made if it is missing.
    vary: field, such as "client.learning_rate" -> its values: a sequence, or a
      text as `points.grid` reads it, such as "log(0.01,1,5)". A grid of all.
    points: instead, the points themselves: field -> value.
    seeds: how many seeds, from `config.seed` on, or the seeds.
    random: draw so many points instead of the grid.
    search_seed: of those draws.
    halving: successive halving: of so many settings one goes on, after so many
      rounds; None trains all to their end.
    metric: by which settings are compared, such as "test/accuracy"; None for
      the first there is of `test`, `unseen` and `seen`, accuracy before loss.
    shapley: where clients are left out, sample so many permutations of them,
      for Shapley values; an even number. `search_seed` is that of the draws.

  Raises:
    UsageError, UnknownNameError, StudyError: what is varied is wrong; nothing
      was written.
    WorkdirError: the folder is in use, or holds another study.
    StudyInterrupted: SIGTERM or SIGINT; a checkpoint was written.

  Example:
    fs.study(config, "studies/rates", seeds=5,
             vary={"client.learning_rate": "log(0.01,1,5)"}).table()
  """
  if is_url(studydir):
    raise UsageError(
      f"--studydir={urls.redacted_url(os.fspath(studydir))} is in a bucket; a"
      " study takes a folder on a disk."
    )
  path = Path(studydir).expanduser()
  made = _prepared(
    _chosen(config, vary, points, random, search_seed, shapley),
    seeds,
    halving,
    metric,
  )
  with held(path) as folder, noted_signals() as received, as_write_error(path):
    made.carry_out(folder, received)
  found = sum_up(path, made.metric, made.higher_is_better)
  if made.left is None:
    show(found)
  else:
    influence.sum_up(found, made.left)
  return found


def predict(
  config: ConfigDict,
  *,
  vary: Mapping[str, Values] | None = None,
  points: Sequence[Mapping[str, Any]] | None = None,
  seeds: int | Sequence[int] = 1,
  random: int | None = None,
  search_seed: int = 0,
  halving: int | None = None,
  metric: str | None = None,
  shapley: int | None = None,
) -> None:
  """Print what a study would take, from one round of it; write nothing.

  The arguments and errors are those of `study`.
  """
  made = _prepared(
    _chosen(config, vary, points, random, search_seed, shapley),
    seeds,
    halving,
    metric,
  )
  plan = Plan(made.runs, StudyFolder(Path()), [])  # where nothing is written
  plan.compile()
  print(plan.predicted(made.rungs))  # noqa: T201


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
  """A study whose runs are built and checked.

  Attributes:
    runs: all of them.
    rungs: rounds after which runs may end, and the last round.
    halving: of so many settings one goes on; None for all.
    metric: by which settings are compared.
    higher_is_better: its direction.
    facts: what makes it this study, as JSON holds it.
    left: whom it leaves out, if that is what it varies.
  """

  runs: Sequence[StudyRun]
  rungs: Sequence[int]
  halving: int | None
  metric: str
  higher_is_better: bool
  facts: Mapping[str, Any]
  left: LeaveOut | None

  def carry_out(self, folder: StudyFolder, received: Sequence[int]) -> None:
    """Run it in its folder, from where it left off."""
    by = self.metric, self.higher_is_better
    folder.begin(self.facts, self.runs, *by)
    plan = Plan(self.runs, folder, received)
    plan.restore()
    if any(run.goes_on for run in self.runs):
      plan.compile()
      print(plan.predicted(self.rungs))  # noqa: T201
    points = by_point(self.runs)
    for since, rung in itertools.pairwise([0, *self.rungs]):
      plan.train(since, rung)
      if rung < self.rungs[-1]:
        points = _best(points, rung, self, folder)
    plan.finish()
    folder.tell()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
  """What a study varies.

  Attributes:
    config: what all runs have in common.
    points: of the runs.
    left: whom it leaves out, if that is what it varies.
    parts: the data sets that were needed to say so.
  """

  config: ConfigDict
  points: Sequence[pointed.Point]
  left: LeaveOut | None
  parts: Parts


def _chosen(
  config: ConfigDict,
  vary: Mapping[str, Values] | None,
  points: Sequence[Mapping[str, Any]] | None,
  random: int | None,
  search_seed: int,
  shapley: int | None,
) -> _Chosen:
  """Return what a study varies, from the arguments of `study`."""
  parts = Parts()
  config, named, left = leave_out.read(
    config, vary or {}, parts, shapley, search_seed
  )
  if left is not None and random is not None:
    raise UsageError(
      f"--random draws some points, and influence on {leave_out.FIELD} needs"
      " all of them; give a grid."
    )
  found = _points(named, points, random, search_seed)
  return _Chosen(config=config, points=found, left=left, parts=parts)


def _prepared(
  chosen: _Chosen,
  seeds: int | Sequence[int],
  halving: int | None,
  metric: str | None,
) -> _Prepared:
  """Build and check all runs, and print what they are."""
  config, points, left = chosen.config, chosen.points, chosen.left
  if jax.process_count() > 1:
    raise StudyError(
      "A study runs in one process, on all of its devices; start it without"
      " --distributed."
    )
  build.check_no_password(complete(config))
  if isinstance(seeds, int):
    validate.integer("seeds", seeds)
    seeds = range(config.seed, config.seed + seeds)
  if not seeds:
    raise UsageError("seeds: give one at least.")
  if len({*seeds}) < len(seeds):
    raise UsageError(f"seeds={list(seeds)}: give each seed once.")
  if halving is not None:
    validate.integer("halving", halving, ge=2)
    if left is not None:
      raise UsageError(
        f"--halving ends runs early, and influence on {leave_out.FIELD} needs"
        " all of them; leave it out."
      )
  began = time.perf_counter()
  runs = build_runs(config, points, list(seeds), warn, chosen.parts)
  if halving is not None:
    for runs_of_point in by_point(runs):
      if why := refusal(runs_of_point[0].experiment):
        raise StudyError(
          f"halving={halving} ends rows of a program, and"
          f" {described(runs_of_point[0].point)} is none: {why}. Leave it out."
        )
  name, higher = _metric(runs, metric)
  if left is not None and left.orders is not None and name.startswith("train/"):
    raise StudyError(
      f"--metric={name}: nobody trains in the empty coalition, whose worth"
      " Shapley values need; take a metric of an evaluation, such as"
      " test/accuracy."
    )
  rungs = _rungs(runs, halving, name)
  print(_described(runs, rungs, time.perf_counter() - began))  # noqa: T201
  return _Prepared(
    runs=runs,
    rungs=rungs,
    halving=halving,
    metric=name,
    higher_is_better=higher,
    facts={
      "config": configs.resolved(config),
      "points": list(points),
      "seeds": list(seeds),
      "halving": halving,
      "metric": name if halving is not None else None,
      "shapley": left and left.facts,
    },
    left=left,
  )


def _points(
  vary: Mapping[str, Values],
  points: Sequence[Mapping[str, Any]] | None,
  random: int | None,
  search_seed: int,
) -> list[pointed.Point]:
  if not isinstance(vary, Mapping):
    raise UsageError(f"vary={vary!r}: give a mapping, field -> values.")
  texts = {field: _text_of(field, values) for field, values in vary.items()}
  if pointed.SEED in texts or any(pointed.SEED in p for p in points or ()):
    raise UsageError("A point sets seed; give the seeds by --seeds.")
  if points is not None:
    if vary or random is not None:
      raise UsageError("Give either points, or what to vary.")
    found = [
      {k: pointed.text_of(v) for k, v in point.items()} for point in points
    ]
    if not found or any(p.keys() != found[0].keys() for p in found):
      raise UsageError("points: give one at least, the same fields in all.")
    return found
  if random is not None:
    validate.integer("random", random)
    if not texts:
      raise UsageError("--random draws what --vary gives; vary a field.")
    return pointed.drawn(texts, random, search_seed)
  return pointed.grid(texts)


def _text_of(field: str, values: Values) -> str:
  if isinstance(values, str):
    return values
  if not isinstance(values, Sequence):
    raise UsageError(
      f"vary[{field!r}]={values!r}: give a sequence of values, or a text such"
      " as 'log(0.01,1,5)'."
    )
  listed = [pointed.text_of(v) for v in values]
  return ",".join(f"({x})" if "," in x else x for x in listed)


def _metric(runs: Sequence[StudyRun], wanted: str | None) -> tuple[str, bool]:
  """Return the metric that settings are compared by, and its direction."""
  simulator = runs[0].simulator
  data = simulator.data
  sets = [
    name
    for name in ("test", "unseen", "seen")
    if getattr(data, name) is not None
  ]
  names = (
    [wanted]
    if wanted
    else [f"{s}/{m}" for m in ("accuracy", "loss") for s in sets]
  )
  error: Exception | None = None
  for name in names:
    try:
      found = directions(
        {},
        [name],
        task=simulator.task,
        models=lambda: simulator.states.models,
        data=data,
      )
      return name, found[name]
    except ValueError as problem:
      error = error or problem
  if wanted and error is not None:
    text = str(error).removeprefix(f"server.best_metrics[0]={wanted!r} ")
    raise StudyError(f"--metric={wanted} {text}") from error
  return "train/loss", False


def _rungs(
  runs: Sequence[StudyRun], halving: int | None, metric: str
) -> list[int]:
  """Return the rounds at which the study halts, the last one among them."""
  last = max(run.rounds for run in runs)
  if halving is None:
    return [last]
  timetable = runs[0].experiment.timetable
  every = timetable.eval_every
  if metric.startswith("test/"):
    every = timetable.test_every
  points = len(by_point(runs))
  return halvings.rungs(points, last, halving, every)


def _described(
  runs: Sequence[StudyRun], rungs: Sequence[int], seconds: float
) -> str:
  """Return what a study is, in words."""
  points = len(by_point(runs))
  seeds = len({run.seed for run in runs})
  lines = [
    f"{counted(len(runs), 'run')}: {counted(points, 'setting')} x"
    f" {counted(seeds, 'seed')}, {rungs[-1]} rounds each; built and checked in"
    f" {seconds:.1f} s."
  ]
  if len(rungs) > 1:
    listed = ", ".join(map(str, rungs[:-1]))
    lines.append(f"The worst settings end after rounds {listed}.")
  return "\n".join(lines)


def _best(
  points: Sequence[list[StudyRun]],
  rung: int,
  made: _Prepared,
  folder: StudyFolder,
) -> list[list[StudyRun]]:
  """Return the settings that go on after a round, and end the others.

  Args:
    points: the runs of each setting that has come so far.
    rung: number of the round.
    made: the study.
    folder: of the study.
  """
  assert made.halving is not None
  scores = [
    float(np.mean([_score(run, rung, made.metric, folder) for run in runs]))
    for runs in points
  ]
  higher = made.higher_is_better
  chosen = halvings.best(scores, made.halving, higher_is_better=higher)
  for i, runs in enumerate(points):
    for run in runs:
      if i not in chosen and run.goes_on:
        run.status = "ended"
        run.reason = f"{made.metric} after round {rung}: mean {scores[i]:.6g}"
  first = max(chosen, key=lambda i: scores[i] if higher else -scores[i])
  print(  # noqa: T201
    f"Round {rung}: {len(chosen)} of {len(points)} settings go on; the best is"
    f" {described(points[first][0].point)}."
  )
  return [points[i] for i in chosen]


def _score(run: StudyRun, rung: int, metric: str, folder: StudyFolder) -> float:
  """Return a run's metric after a round, or after its last one before.

  NaN if it diverged before.
  """
  if run.status == "diverged" and run.done < rung:
    return math.nan
  value = math.nan
  for row in read_metrics(folder.run(run) / "metrics.jsonl"):
    if row["round"] <= rung:
      value = row.get(metric, value)
  return value
