"""The runs of a study: built, checked, and grouped by the program they share.

All runs are built before anything is compiled, so that a value that one of
them refuses costs no compute. Runs whose rounds are one program, as they differ
in seeds and numeric hyper-parameters alone, become rows of it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim.config import build, flags
from fedjax_sim.config.build.parts import Parts, program_of
from fedjax_sim.core.digests import digest
from fedjax_sim.core.errors import FedjaxSimError, one_line
from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.engine.fingerprint import fingerprint
from fedjax_sim.run import changes
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.studies.points import Point


class StudyError(FedjaxSimError, ValueError):
  """A study cannot be what it is asked to be."""


@dataclasses.dataclass(kw_only=True, eq=False)
class StudyRun:
  """One run of a study.

  Attributes:
    name: of its folder, such as "007".
    point: field -> value, as text, of the varied fields.
    seed: of the run.
    config: complete; that of the same run by itself.
    experiment: what the config describes.
    program: number of the program whose row it is.
    status: "waiting", "running", "finished", "diverged", or "ended" before its
      last round by halving.
    reason: why it diverged, or what ended it; "" otherwise.
    done: rounds done.
  """

  name: str
  point: Point
  seed: int
  config: ConfigDict
  experiment: build.Experiment
  program: int = 0
  status: str = "waiting"
  reason: str = ""
  done: int = 0

  @property
  def simulator(self) -> Simulator:
    """What runs."""
    return self.experiment.simulator

  @property
  def rounds(self) -> int:
    """The run's last round."""
    return self.experiment.timetable.rounds

  @property
  def goes_on(self) -> bool:
    """Whether there are rounds to do."""
    return self.status in ("waiting", "running")

  @property
  def sources(self) -> dict[str, str]:
    """What its results rest on besides the config: code, and weights."""
    return dict(self.experiment.sources)

  def __str__(self) -> str:
    """Return its name and what makes it differ, for messages."""
    return f"run {self.name} ({described(self.point, self.seed)})"


def described(point: Point, seed: int | None = None) -> str:
  """Return a point in words, such as "algorithm.name=fedavg, seed=3"."""
  fields = [f"{field}={value}" for field, value in point.items()]
  return ", ".join(fields + ([] if seed is None else [f"seed={seed}"]))


def build_runs(
  config: ConfigDict,
  points: Sequence[Point],
  seeds: Sequence[int],
  warn: Callable[[str], None],
  parts: Parts,
) -> list[StudyRun]:
  """Return the runs of all points with all seeds, seed after seed.

  Args:
    config: what all have in common.
    points: field -> value, as text.
    seeds: of the runs of each point.
    warn: is told of points that are the same.
    parts: gets the data sets and tasks that runs share.

  Raises:
    UsageError, UnknownNameError: a field that there is not, or a text that is
      no value of it.
    StudyError: a run refuses its values; names the run.
  """
  runs = list[StudyRun]()
  count = len(points) * len(seeds)
  digits = max(3, len(str(count - 1)))
  known: dict[str, Point] = {}
  for point in points:
    try:
      own = flags.overridden(copy.deepcopy(config), _set(config, point))
      experiment = _built(own, parts)
    except (flags.UsageError, TypeError, ValueError, ImportError) as error:
      if len(points) == 1 and not point:
        raise
      hint = ""
      unknown = isinstance(error.__cause__ or error, UnknownNameError)
      if unknown and len(point) > 1:
        hint = (
          " Where only some settings take a field, list them by --points, with"
          " an empty cell or null for the others."
        )
      raise StudyError(
        f"{described(point) or 'the config'}: {one_line(error)}{hint}"
      ) from error
    complete = experiment.config
    text = json.dumps(configs.resolved(complete), sort_keys=True)
    if text in known:
      warn(
        f"{described(point)} and {described(known[text])} are the same config:"
        " what differs changes nothing, and the second one is left out."
      )
      continue
    known[text] = point
    for seed in seeds:
      seeded = copy.deepcopy(complete)
      seeded.seed = seed
      simulator = dataclasses.replace(experiment.simulator, seed=seed)
      runs.append(
        StudyRun(
          name=str(len(runs)).zfill(digits),
          point=point,
          seed=seed,
          config=seeded,
          experiment=dataclasses.replace(
            experiment, simulator=simulator, config=seeded
          ),
        )
      )
  _warn_of_idle(points, runs, warn)
  _group(runs)
  _part_programs(runs)
  return runs


def _warn_of_idle(
  points: Sequence[Point], runs: Sequence[StudyRun], warn: Callable[[str], None]
) -> None:
  """Tell of varied fields that change no result, and of what runs will lack."""
  for field in points[0]:
    if field in changes.FREE and field != changes.ROUNDS:
      warn(f"{field} is varied, and changes no result of a run.")
  trackers = {
    tracker.label for run in runs for tracker in run.experiment.trackers
  } - {"tensorboard"}
  if trackers:
    warn(
      f"trackers ({', '.join(sorted(trackers))}) are told nothing of runs that"
      " are rows of a program."
    )
  private = [run for run in runs if run.simulator.algorithm.privacy is not None]
  if len(private) > 1 and private[0].simulator.noise_seed is None:
    warn(
      f"Each epsilon is that of one run; {len(private)} private runs on the"
      " same data cost more together: fedjax-sim privacy compose"
      " STUDYDIR/runs/* --delta=D."
    )
  elif len(private) > 1:
    warn(
      f"privacy.noise_seed={private[0].simulator.noise_seed}: {len(private)}"
      " runs have the same noise, so each epsilon holds for its run alone, and"
      " none for several of them together."
    )


def _set(config: ConfigDict, point: Point) -> Point:
  """Return the point without fields that are unset here and in the config."""
  known = dict(configs.fields_of(config))
  return {
    field: text
    for field, text in point.items()
    if text != "None" or known.get(field) is not None
  }


def by_point(runs: Sequence[StudyRun]) -> list[list[StudyRun]]:
  """Return the runs of each setting, one for each seed."""
  found: dict[int, list[StudyRun]] = {}
  for run in runs:
    found.setdefault(id(run.point), []).append(run)
  return list(found.values())


def _built(config: ConfigDict, parts: Parts) -> build.Experiment:
  """Return the experiment of a run; of a row, on one device with one lane."""
  if config.runtime.model_devices in (None, 1):
    row = copy.deepcopy(config)
    row.runtime.devices = 1
    if row.runtime.lanes == "auto":
      with row.ignore_type():
        row.runtime.lanes = 1
    experiment = build.build(row, parts)
    if not refusal(experiment):
      return experiment
  return build.build(config, parts)


def _group(runs: Sequence[StudyRun]) -> None:
  """Give each run its program's number; they count from the first run."""
  numbers: dict[Hashable, int] = {}
  of_point: dict[int, Hashable] = {}
  for run in runs:
    # Runs of one point, which differ in the seed, share the point.
    key = of_point.get(id(run.point))
    if key is None:
      timetable = dataclasses.replace(
        run.experiment.timetable, rounds=1, wanted=1
      )
      alone = bool(refusal(run.experiment))
      key = program_of(run.simulator), timetable, alone
      of_point[id(run.point)] = key
    run.program = numbers.setdefault(key, len(numbers))


def _part_programs(runs: Sequence[StudyRun]) -> None:
  """Give each setting a program of its own where code reads its numbers.

  What a function holds is compared, but it may also come by a hyper-parameter's
  value on its way, while it is traced. So of every program the first and the
  last setting are traced.
  """
  members: dict[int, list[StudyRun]] = {}
  for run in runs:
    members.setdefault(run.program, []).append(run)
  last = max(members)
  for own in members.values():
    points = by_point(own)
    if len(points) == 1 or refusal(own[0].experiment):
      continue
    if _traced(own[0].simulator) != _traced(own[-1].simulator):
      for point in points[1:]:
        last += 1
        for run in point:
          run.program = last


def _traced(simulator: Simulator) -> Hashable:
  """Return the round as it is traced, without addresses of objects."""
  lanes = 1 if simulator.runtime.lanes == "auto" else simulator.runtime.lanes
  size = simulator.sampler.sizes[-1]
  simulator.compiler.trace(lanes, size)
  traced = simulator.compiler.traced[lanes, size].jaxpr
  text = re.sub(r"0x[0-9a-f]+", "", str(traced))
  return text, tuple(digest(np.asarray(x)) for x in traced.consts)


def refusal(experiment: build.Experiment) -> str:
  """Return why runs cannot be rows of a program; "" if they can."""
  simulator = experiment.simulator
  if simulator.planner.cohorts.observes:
    return (
      "sampler.name: the sampler learns from the rounds before, so that each"
      " run draws its own cohorts as it goes"
    )
  if simulator.log_clients:
    return "server.client_log=True keeps what each client did"
  if experiment.finetuning is not None:
    return (
      "client.finetune_epochs and client.finetune_steps train every client at"
      " each evaluation"
    )
  if simulator.runtime.model_devices not in (None, 1):
    return "runtime.model_devices: several devices share a model"
  if simulator.runtime.deterministic_reduction is not None:
    return "runtime.deterministic_reduction: its bits are those of a single run"
  if simulator.states.rows is not None:
    return "runtime.state_residency: each run's client states are in a file"
  if simulator.residency.sliced:
    return (
      f"runtime.residency={simulator.residency.name!r} sends each run the"
      " examples of its clients; the data have to fit on a device"
    )
  return ""


def plan_key(run: StudyRun) -> Hashable:
  """Return what a run's plans depend on: equal ones share their batches."""
  return run.seed, fingerprint(run.simulator.sampler)
