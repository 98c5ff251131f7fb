"""Verify a run: execute its rounds again, and compare bit by bit.

Between two checkpoints a run is a function of the first one: the state that it
leaves, and the metrics of its rounds, have to be those of the second one and of
`metrics.jsonl`. The workdir is only read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim import reporting
from fedjax_sim.config import build
from fedjax_sim.config.build import Experiment, Timetable
from fedjax_sim.core import PyTree, validate
from fedjax_sim.core.digests import digest
from fedjax_sim.core.types import EMPTY
from fedjax_sim.run import client_states
from fedjax_sim.run.changes import ORIGIN, read_config, stored_config
from fedjax_sim.run.checkpoint_files import first_line
from fedjax_sim.run.checkpoint_reader import CheckpointReader, Restored
from fedjax_sim.run.loop import Loop
from fedjax_sim.run.resume import (
  Begun,
  Totals,
  data_digest,
  environment,
  going_on,
  refuse_other_data,
  with_timetable,
)
from fedjax_sim.run.tracking import Journal
from fedjax_sim.run.workdir import WorkdirError
from fedjax_sim.simulation.dispatch import DispatchResult, Row
from fedjax_sim.simulation.timing import Phases

_SHOWN = 5  # differences that are named, of each kind


class Comparison(NamedTuple):
  """What executing some rounds again gave.

  Attributes:
    start: rounds done before the first of them; 0 begins anew.
    end: rounds done after the last of them.
    arrays: number of arrays in the checkpoint at the end.
    differing: array -> its largest difference, of those that differ.
    rows: number of rows of metrics.
    other_rows: metric -> its largest difference, of those that differ.
    trouble: why the rounds could not be compared; "" if they were.
  """

  start: int
  end: int
  arrays: int = 0
  differing: Mapping[str, float] = EMPTY
  rows: int = 0
  other_rows: Mapping[str, float] = EMPTY
  trouble: str = ""

  @property
  def equal(self) -> bool:
    """Whether everything is as it was, bit by bit."""
    return not (self.differing or self.other_rows or self.trouble)

  def describe(self) -> str:
    """Return the result on one line."""
    head = f"rounds {self.start + 1} to {self.end}"
    if self.trouble:
      return f"{head}: not compared: {self.trouble}"
    return (
      f"{head}: checkpoint, {_in_words(self.differing, self.arrays, 'array')};"
      f" metrics, {_in_words(self.other_rows, self.rows, 'row')}"
    )


def verify(
  workdir: Path,
  rounds: str,
  report: Callable[[str], None],
  *,
  data_path: str | None = None,
) -> list[Comparison]:
  """Execute rounds of a run again, and compare.

  Args:
    workdir: of the run; it is not changed.
    rounds: "checkpoints" for all rounds between two checkpoints, "all" from the
      first round to the newest checkpoint, or "FROM-TO".
    report: called with each line of the result.
    data_path: instead of the config's `data.path`, where the data lie now.

  Returns:
    A comparison for each stretch of rounds between checkpoints.

  Raises:
    WorkdirError: the folder holds no run, or no checkpoint to compare with.
    ConfigChangedError: the data, or the account of a private run, are not those
      of the run.
    TypeError, ValueError, OSError, ImportError: what the run was built from is
      missing or has changed.
  """
  config = stored_config(workdir)
  if config is None:
    raise WorkdirError(f"--workdir={workdir} holds no run; name its folder.")
  metrics = workdir / "metrics.jsonl"
  if not metrics.exists():
    raise WorkdirError(f"{metrics} is missing; restore it.")
  if data_path is not None:
    with config.unlocked():
      config.data.path = data_path
  reader = CheckpointReader(workdir / "checkpoints")
  saved = reader.rounds()
  begins = ORIGIN not in (read_config(workdir) or {})
  if saved and begins and saved[0]:
    saved = [0, *saved]
  stretches = stretches_of(saved, reader.rounds(), rounds, workdir)
  asked = config.runtime.state_residency
  with config.unlocked():
    config.runtime.state_residency = client_states.asked_in(workdir, asked)
  experiment = build.build(config)
  measured = data_digest(experiment.simulator)
  like = experiment.simulator.states.host_shapes
  rows = reporting.read_metrics(metrics)
  _report_software(reader, experiment, like, measured, report)
  done = []
  for start, end in stretches:
    done.append(
      _compare(workdir, experiment, reader, rows, measured, start, end)
    )
    report(done[-1].describe())
  reader.close()
  return done


def stretches_of(
  starts: Sequence[int], saved: Sequence[int], text: str, workdir: Path
) -> list[tuple[int, int]]:
  """Return the stretches between checkpoints that hold the wanted rounds.

  Args:
    starts: rounds of the checkpoints, in order, and 0 where the run began.
    saved: rounds of the checkpoints.
    text: as in `verify`.
    workdir: for messages.

  Raises:
    WorkdirError: there are no two checkpoints.
    ValueError: rounds are wanted that are not all between checkpoints.
  """
  every = list(itertools.pairwise(starts))
  if not every:
    raise WorkdirError(
      f"--workdir={workdir} has no two checkpoints, so there is nothing to"
      " compare with."
    )
  if text == "all":
    return every
  if text == "checkpoints":
    between = [pair for pair in every if pair[0] in saved]
    return between or every
  found = re.fullmatch(r"(\d+)-(\d+)", text)
  if not found or int(found[1]) > int(found[2]):
    raise ValueError(
      f"--rounds={text}: give all, checkpoints, or FROM-TO, such as 1-20."
    )
  first, last = int(found[1]), int(found[2])
  if max(first, 1) <= starts[0] or last > starts[-1]:
    raise ValueError(
      f"--rounds={text}: by its checkpoints the run in {workdir} can be"
      f" verified from round {starts[0] + 1} to round {starts[-1]}; give rounds"
      " of these."
    )
  return [(a, b) for a, b in every if b >= first and a < last]


def _report_software(
  reader: CheckpointReader,
  experiment: Experiment,
  like: PyTree,
  measured: str,
  report: Callable[[str], None],
) -> None:
  """Report on what machine and software the run was, and is executed now."""
  facts = None
  for round_ in reversed(reader.rounds()):
    try:
      facts = reader.read(round_, like).facts
      break
    except Exception as error:  # whatever a damaged checkpoint raises
      report(f"the checkpoint of round {round_}: {first_line(error)}")
  if facts is None:
    raise WorkdirError("No checkpoint of the run can be read.")
  refuse_other_data(facts["data"], measured)
  now = {**environment(experiment.simulator), **experiment.sources}
  then = {**facts["environment"], **facts.get("sources", {})}
  changed = validate.differences(then, now)
  report(
    f"other than then: {'; '.join(changed)}"
    if changed
    else "machine and software: as then"
  )


def _compare(
  workdir: Path,
  experiment: Experiment,
  reader: CheckpointReader,
  rows: Sequence[Row],
  measured: str,
  start: int,
  end: int,
) -> Comparison:
  """Execute the rounds between two checkpoints again, and compare."""
  like = experiment.simulator.states.host_shapes
  try:
    last = reader.read(end, like)
    first = reader.read(start, like) if start in reader.rounds() else None
  except FileNotFoundError as error:
    gone = f"{first_line(error)}; does the run go on?"
    return Comparison(start, end, trouble=gone)
  except Exception as error:  # whatever a damaged checkpoint raises
    return Comparison(start, end, trouble=first_line(error))
  timetables = last.facts.get("timetables", [])
  found: list[Row] = []
  begun = _begun(experiment, first, last, measured, workdir)
  for until, timetable in _pieces(experiment.timetable, timetables, start, end):
    # Which rounds were evaluated, the timetable of then says.
    piece = dataclasses.replace(experiment, timetable=timetable)
    begun = _executed(piece, workdir, begun, measured, until, found)
  state = begun.simulator.states.to_host(begun.state)
  arrays = map(client_states.comparable, (last.state, state))
  theirs = [row for row in rows if start < row["round"] <= end]
  if start == 0:
    theirs = [row for row in rows if row["round"] <= end]
  return Comparison(
    start,
    end,
    arrays=len(jax.tree.leaves(state)),
    differing=_array_differences(*arrays),
    rows=len(theirs),
    other_rows=_row_differences(theirs, found),
  )


def _begun(
  experiment: Experiment,
  first: Restored | None,
  last: Restored,
  measured: str,
  workdir: Path,
) -> Begun:
  """Return where the rounds begin: a checkpoint, or the run's beginning."""
  if first is not None:
    return going_on(experiment, first, measured, workdir)
  # Lanes, and fresh entropy of private noise, are what the run once chose.
  begun = going_on(experiment, last, measured, workdir)
  state = begun.simulator.init()
  noise = jax.device_put(
    np.asarray(last.state.noise_seed), state.noise_seed.sharding
  )
  return begun._replace(
    state=state._replace(noise_seed=noise),
    done=0,
    resumed=False,
    before=Totals(),
  )


def _pieces(
  timetable: Timetable,
  timetables: Sequence[Mapping[str, Any]],
  start: int,
  end: int,
) -> Iterator[tuple[int, Timetable]]:
  """Yield the timetables of a stretch of rounds, each with where it ends.

  Args:
    timetable: that of now, for checkpoints of older versions.
    timetables: those that the run has had, as checkpoints hold them.
    start: rounds done before the stretch.
    end: rounds done after it.
  """
  entries = [dict(entry) for entry in timetables] or [{"begins": 0}]
  begins = [entry.pop("begins") for entry in entries]
  ends = [*begins[1:], end]
  for first, last, fields in zip(begins, ends, entries, strict=True):
    if last > start and first < end:
      yield min(last, end), dataclasses.replace(timetable, **fields)


def _executed(
  experiment: Experiment,
  workdir: Path,
  begun: Begun,
  measured: str,
  until: int,
  rows: list[Row],
) -> Begun:
  """Execute rounds; return where they end, and add their rows to `rows`."""
  state, last = begun.state, experiment.timetable.rounds
  if begun.timetables[-1]["rounds"] == begun.done < last:
    state = begun.simulator.react.continued(state)
  journal = _Rows()
  loop = Loop(
    experiment=experiment,
    folder=workdir,
    checkpoints=None,
    phases=Phases(),
    data_digest=measured,
    journal=journal,
    received=[],
    on_round=lambda round_: None,
    profile=None,
    singles=0,
    until=until,
    **begun._replace(state=state)._asdict(),
  )
  loop.run()
  rows += journal.rows
  return begun._replace(
    state=loop.state,
    done=loop.done,
    resumed=True,
    timetables=with_timetable([], until, experiment.timetable),
  )


class _Rows(Journal):
  """Keeps the rows of rounds, and writes nothing."""

  def __init__(self) -> None:
    self.rows: list[Row] = []

  def begin(self, row: Row) -> None:
    self.rows.append(row)

  def write(self, done: int, out: DispatchResult, eval_seconds: float) -> None:
    self.rows += out.rows


def _array_differences(before: PyTree, now: PyTree) -> dict[str, float]:
  """Return the arrays that differ in a bit -> their largest difference."""
  found = {}
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(before),
    jax.tree.leaves(now),
    strict=True,
  )
  for (path, a), b in pairs:
    a, b = np.asarray(a), np.asarray(b)
    if digest(a) != digest(b):
      found[jax.tree_util.keystr(path)] = _distance(a, b)
  return found


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  """Return the largest difference of two arrays; NaN where only one is NaN."""
  x, y = a.astype(np.float64), b.astype(np.float64)
  apart = np.where(np.isnan(x) & np.isnan(y), 0.0, np.abs(x - y))
  return float(np.max(apart, initial=0.0))


def _row_differences(
  before: Sequence[Row], now: Sequence[Row]
) -> dict[str, float]:
  """Return the metrics that differ in a round -> their largest difference."""
  found: dict[str, float] = {}
  there = {int(row["round"]): row for row in before}
  here = {int(row["round"]): row for row in now}
  for round_ in sorted(there.keys() | here.keys()):
    if round_ not in there or round_ not in here:
      found[f"round {round_}, whole"] = math.nan
      continue
    for name, apart in _differences(there[round_], here[round_]):
      if not apart <= found.get(name, -1.0):
        found[name] = apart
  return found


def _differences(a: Row, b: Row) -> Iterator[tuple[str, float]]:
  """Yield the metrics of two rows that differ, and by how much."""
  for name in sorted(a.keys() | b.keys()):
    x, y = float(a.get(name, math.nan)), float(b.get(name, math.nan))
    same = x == y or (math.isnan(x) and math.isnan(y))
    if not same or (name in a) != (name in b):
      yield name, abs(x - y)


def _in_words(differing: Mapping[str, float], count: int, what: str) -> str:
  """Return in words how much differs."""
  if not differing:
    return f"{count} {what}{'s' * (count != 1)} equal"
  names = [
    f"{name} by {apart:.3g}" for name, apart in list(differing.items())[:_SHOWN]
  ]
  more = ", ..." if len(differing) > _SHOWN else ""
  return f"{len(differing)} differ: {', '.join(names)}{more}"
