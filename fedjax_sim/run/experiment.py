"""A run in a workdir: resume, train, evaluate, log, checkpoint, sum up.

The workdir holds `config.json`, `data_profile.json`, `metrics.jsonl`,
`timings.jsonl`, `events/`, `checkpoints/`, of a private run `privacy.json`,
where there are trackers on a server `trackers.json`, and at the end
`summary.json`, `curves.png`, `report.html` and `clients_*.csv`; with
`server.client_log` also `client_rounds/`, which at the end becomes
`client_rounds.parquet` and `client_rounds.png`. Running on the same workdir
goes on where the newest whole checkpoint ends; the metrics are cut back to it,
so no line is lost or doubled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim import reporting
from fedjax_sim.config import build
from fedjax_sim.config.build import privacy
from fedjax_sim.config.completion import complete, reference_fields
from fedjax_sim.core import references
from fedjax_sim.data import profile as data_profile
from fedjax_sim.distributed import processes
from fedjax_sim.engine.state import RunState
from fedjax_sim.privacy.accounting import composition
from fedjax_sim.run import branch, changes, profiling
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.loop import Loop
from fedjax_sim.run.resume import (
  account_facts,
  begin,
  data_digest,
  versions,
  warn,
)
from fedjax_sim.run.signals import noted_signals
from fedjax_sim.run.summary import print_summary, sum_up
from fedjax_sim.run.trackers import deliver_rest, tracked
from fedjax_sim.run.tracking import journal
from fedjax_sim.run.workdir import (
  as_write_error,
  finished_summary,
  locked,
  rounds_done,
)
from fedjax_sim.simulation.timing import Phases


def run(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  on_round: Callable[[int], None] = lambda round_: None,
  *,
  branch_from: str = "",
  profile: bool = False,
) -> dict[str, Any]:
  """Run a config in a workdir, or go on with it.

  With several processes all of them call it; the first one alone reads and
  writes the workdir.

  Args:
    config: as a config file returns it.
    workdir: made if it is missing.
    on_round: is told how many rounds are done.
    branch_from: "WORKDIR" or "WORKDIR:ROUND", the run and the checkpoint that
      this one begins with; "" to begin anew.
    profile: trace a few rounds, and print a table of where the time goes.

  Returns:
    The summary, as in `summary.json`.

  Raises:
    ConfigChangedError: the workdir holds a run with another config or data.
    WorkdirError: it cannot be written, or another process uses it.
    PeerError: another process refuses, or takes part in another run.
    TypeError, ValueError, OSError, ImportError: the config is wrong; nothing
      was written.
    Interrupted: SIGTERM or SIGINT, in any process; a checkpoint was written.
    WriteError, CheckpointError: the disk is full or refuses.
    DivergedError: a round left no finite update, or no finite model.
  """
  phases = Phases()
  folder = Path(workdir)
  config = complete(config)
  resolved = configs.resolved(config)

  def look() -> tuple[changes.Changes, int, Any, dict[str, Any] | None]:
    origin = branch.origin_of(folder, branch_from)
    changed = changes.changes_since(folder, resolved) or {}
    finished = changes.ROUNDS not in changed
    summary = finished_summary(folder) if finished else None
    told = origin and origin._asdict()
    return changed, rounds_done(folder), told, summary

  changed, done, told, finished = processes.from_first(look)
  if finished is not None:
    if processes.is_first():
      nothing = "nothing is left to profile, and " if profile else ""
      print(  # noqa: T201
        f"The run in {folder} is finished; {nothing}for more rounds raise"
        f" --config.{changes.ROUNDS}."
      )
      print_summary(finished, folder)
      deliver_rest(config, folder, finished["rounds"])
    return finished

  def start() -> tuple[build.Experiment, dict[str, Any]]:
    with phases("build"):
      experiment = build.build(config)
      named = dict(configs.fields_of(config))
      with references.named(reference_fields(config), named):
        experiment.simulator.trace()
      timetable = experiment.timetable
      changes.check_evaluations(changed, experiment.simulator, timetable, done)
      digest = data_digest(experiment.simulator)
    fields = dict(configs.fields_of(ConfigDict(changes.decisive(resolved))))
    # A path may be another on every host; what lies there may not. So of
    # references, and of the weights to begin from.
    fields.pop("data.path", None)
    fields.update(experiment.sources)
    same = {
      "--profile": profile,  # it changes the rounds of a dispatch
      "devices of a process": jax.local_device_count(),
      "widest float": str(jax.dtypes.canonicalize_dtype(np.float64)),
    }
    return experiment, {**fields, **versions(), **same, "data": digest}

  origin = None if told is None else branch.Origin(**told)
  experiment, facts = processes.check_same(start, config.runtime.start_timeout)
  timetable = experiment.timetable
  saved = folder / "checkpoints"
  with contextlib.ExitStack() as stack:
    checkpoints: Checkpoints | None = None

    def prepare() -> None:
      nonlocal checkpoints
      stack.enter_context(locked(folder))
      changes.changes_since(folder, resolved)  # nobody can change it any more
      with as_write_error(folder):
        checkpoints = Checkpoints(
          saved,
          keep=timetable.keep_checkpoints,
          snapshot_every=timetable.snapshot_every,
        )
        stack.enter_context(contextlib.closing(checkpoints))

    def take_over(fresh: RunState) -> RunState:
      assert origin is not None
      account = account_facts(experiment.simulator, origin.round)
      begun = branch.take_over(
        origin, experiment, fresh, facts["data"], account
      )
      for line in begun.lines:
        warn(line)
      branch.copy_rows(origin, folder)
      return begun.state

    def describe() -> None:
      # A run that gets more rounds is not finished, and its config says so.
      (folder / "summary.json").unlink(missing_ok=True)
      beside = {} if origin is None else {changes.ORIGIN: origin._asdict()}
      reporting.write_json(folder / "config.json", {**resolved, **beside})
      described = data_profile.profile_of(experiment.simulator.data)
      reporting.write_json(folder / data_profile.FILE, described)
      rounds = experiment.timetable.rounds
      account = privacy.account(config, experiment.simulator, rounds)
      if account is not None:
        reporting.write_json(folder / composition.FILE, account)
      if changed:
        told = "; ".join(f"{k}: {a} -> {b}" for k, (a, b) in changed.items())
        warn(f"The run goes on with other settings: {told}.")

    with phases("checkpoint"):
      processes.from_first(prepare)
    received = stack.enter_context(noted_signals())
    with as_write_error(folder):
      summary, profiled = _run(
        experiment,
        folder,
        checkpoints,
        received,
        phases,
        facts["data"],
        on_round,
        profile,
        describe,
        None if origin is None else take_over,
      )
  if processes.is_first():
    print_summary(summary, folder)
  if profiled is not None:
    profiling.show(profiled)
  return summary


def _run(
  experiment: build.Experiment,
  folder: Path,
  checkpoints: Checkpoints | None,
  received: list[int],
  phases: Phases,
  data_digest: str,
  on_round: Callable[[int], None],
  profiled: bool,
  describe: Callable[[], None],
  take_over: Callable[[RunState], RunState] | None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Restore or begin, run to the end, and sum up; return summary and profile.

  Args:
    experiment: what the config describes.
    folder: the workdir.
    checkpoints: None in all processes but the first one.
    received: signals so far.
    phases: measures what takes how long.
    data_digest: of the data.
    on_round: is told how many rounds are done.
    profiled: whether to trace a few rounds.
    describe: writes what the workdir says of the run, once nothing refuses it.
    take_over: see `begin`; None for no branch.
  """
  begun = begin(experiment, checkpoints, phases, data_digest, take_over)
  processes.from_first(describe)
  simulator = begun.simulator
  begins = begun.done == 0 and experiment.timetable.initial_eval
  first_round = begun.done + (not begins)
  with tracked(experiment, folder, first_round) as trackers:
    with contextlib.ExitStack() as stack:
      profile = None
      if profiled and processes.is_first():
        profile = profiling.Profile(folder / "profile", phases)
        stack.enter_context(profile)
      with phases("write"):
        told = stack.enter_context(
          journal(
            folder,
            rounds=experiment.timetable.rounds,
            done=begun.done,
            trackers=trackers,
            begins=begins,
            log_clients=simulator.log_clients,
            name_of=simulator.data.train.client_name
            if not simulator.algorithm.requirements.pools_data
            else lambda _: "all clients",
          )
        )
      loop = Loop(
        experiment=experiment,
        folder=folder,
        checkpoints=checkpoints,
        phases=phases,
        data_digest=data_digest,
        journal=told,
        received=received,
        on_round=on_round,
        profile=profile,
        singles=profiling.SINGLES if profiled else 0,
        **begun._asdict(),
      )
      del begun  # whose state would live as long as the run
      loop.run()
    summary = sum_up(
      experiment,
      simulator,
      loop.state,
      loop.choice,
      loop.count,
      phases,
      folder,
      loop.measured,
    )
  return summary, None if profile is None else profile.write(simulator)
