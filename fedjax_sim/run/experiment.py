"""A run in a workdir: resume, train, evaluate, log, checkpoint, sum up.

The workdir holds `config.json`, `data_profile.json`, `metrics.jsonl`,
`timings.jsonl`, `events/`, `checkpoints/`, of a private run `privacy.json`,
where there are trackers on a server `trackers.json`, and at the end
`summary.json`, `curves.png`, `report.html` and `clients_*.csv`; with
`server.client_log` also `client_rounds/`, which at the end becomes
`client_rounds.parquet` and `client_rounds.png`. Where a bucket has a copy,
`bucket.json` names the run. Running on the same workdir goes on where the
newest whole checkpoint ends; the metrics are cut back to it, so no line is lost
or doubled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
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
from fedjax_sim.run import branch, changes, client_states, profiling
from fedjax_sim.run.bucket.mirror import Place, placed
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
from fedjax_sim.run.standing import Standing, look
from fedjax_sim.run.summary import print_summary, sum_up
from fedjax_sim.run.trackers import Trackers, deliver_rest, tracked
from fedjax_sim.run.tracking import Journal, journal
from fedjax_sim.run.workdir import as_write_error, is_seen_by_all
from fedjax_sim.simulation.ahead import Ahead
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.simulation.timing import Phases


def run(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  on_round: Callable[[int], None] = lambda round_: None,
  *,
  branch_from: str = "",
  profile: bool = False,
  sync_to: str | None = None,
) -> dict[str, Any]:
  """Run a config in a workdir, or go on with it.

  With several processes all of them call it; the first one alone reads and
  writes the workdir.

  Args:
    config: as a config file returns it.
    workdir: a folder, made if it is missing; or the URL of a folder in a
      bucket, for which the run works in a folder of the user's cache.
    on_round: is told how many rounds are done.
    branch_from: "WORKDIR" or "WORKDIR:ROUND", the run and the checkpoint that
      this one begins with; "" to begin anew.
    profile: trace a few rounds, and print a table of where the time goes.
    sync_to: URL of a folder in a bucket that gets a copy of the workdir, after
      each checkpoint; None for none.

  Returns:
    The summary, as in `summary.json`.

  Raises:
    ConfigChangedError: the workdir holds a run with another config or data.
    WorkdirError: it cannot be written, or another process uses it; or the
      bucket is in use, or holds another run.
    PeerError: another process refuses, or takes part in another run.
    TypeError, ValueError, OSError, ImportError: the config is wrong; nothing
      was written.
    Interrupted: SIGTERM or SIGINT, in any process; a checkpoint was written.
    WriteError, CheckpointError: the disk is full or refuses, or no checkpoint
      is whole.
    CopyError: the run is finished and the workdir complete, but its copy in the
      bucket is not.
    DivergedError: a round left no finite update, or no finite model.
  """
  phases = Phases()
  with placed(workdir, sync_to) as place:
    config = complete(config)
    build.check_no_password(config)
    resolved = configs.resolved(config)
    standing = look(place.folder, resolved, branch_from)
    if standing.finished is not None:
      _say_finished(config, place, standing.finished, profile)
      return standing.finished
    ready = lambda: _ready(config, resolved, standing, phases, profile)
    experiment, facts = processes.check_same(
      ready, config.runtime.start_timeout
    )
    experiment = client_states.in_workdir(
      experiment, place.folder, mirrored=place.mirror is not None
    )
    launch = _Launch(
      experiment=experiment,
      resolved=resolved,
      place=place,
      standing=standing,
      data_digest=facts["data"],
      phases=phases,
      on_round=on_round,
      profiled=profile,
    )
    with contextlib.ExitStack() as stack:
      processes.from_first(lambda: stack.enter_context(place.held()))
      summary, profiled = launch.run()
      if processes.is_first():
        print_summary(summary, place.name)
      if profiled is not None:
        profiling.show(profiled)
    return summary


def _say_finished(
  config: ConfigDict, place: Place, summary: dict[str, Any], profile: bool
) -> None:
  """Print that nothing is left to do, and what the run gave; send the rest."""
  if not processes.is_first():
    return
  nothing = "nothing is left to profile, and " if profile else ""
  print(  # noqa: T201
    f"The run in {place.name} is finished; {nothing}for more rounds raise"
    f" --config.{changes.ROUNDS}."
  )
  print_summary(summary, place.name)
  deliver_rest(config, place, summary["rounds"])
  if place.mirror is not None:
    with place.held():
      pass  # its end copies what the bucket lacks


def _ready(
  config: ConfigDict,
  resolved: dict[str, Any],
  standing: Standing,
  phases: Phases,
  profile: bool,
) -> tuple[build.Experiment, dict[str, Any]]:
  """Build the experiment; return it, and what is the same on all processes."""
  with phases("build"):
    experiment = build.build(config)
    named = dict(configs.fields_of(config))
    with references.named(reference_fields(config), named):
      experiment.simulator.trace()
    changes.check_evaluations(
      standing.changed,
      experiment.simulator,
      experiment.timetable,
      standing.done,
    )
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Launch:
  """A run that is about to begin, or to go on.

  Attributes:
    experiment: what the config describes.
    resolved: the config, as JSON holds it.
    place: where the workdir is.
    standing: how far the run is.
    data_digest: of the data.
    phases: measures what takes how long.
    on_round: is told how many rounds are done.
    profiled: whether to trace a few rounds.
  """

  experiment: build.Experiment
  resolved: dict[str, Any]
  place: Place
  standing: Standing
  data_digest: str
  phases: Phases
  on_round: Callable[[int], None]
  profiled: bool

  def run(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Restore or begin, run to the end, and sum up.

    Returns:
      The summary, and what was profiled.
    """
    folder, phases = self.place.folder, self.phases
    with contextlib.ExitStack() as stack:
      with phases("checkpoint"):
        checkpoints = stack.enter_context(self._checkpoints())
      received = stack.enter_context(noted_signals())
      stack.enter_context(as_write_error(folder))
      stack.callback(client_states.close, self.experiment.simulator)
      ahead = stack.enter_context(contextlib.closing(Ahead()))
      if processes.is_first():
        ahead.load(reporting.LATER)
      begun = begin(
        self.experiment,
        checkpoints,
        phases,
        self.data_digest,
        None if self.standing.origin is None else self._take_over,
        ahead.compile,
      )
      processes.from_first(self._describe)
      simulator, done = begun.simulator, begun.done
      stack.callback(client_states.close, simulator)
      begins = done == 0 and self.experiment.timetable.initial_eval
      first_round = done + (not begins)
      trackers = stack.enter_context(
        tracked(self.experiment, self.place, first_round)
      )
      with self._outputs(done, begins, simulator, trackers) as (
        written,
        profile,
      ):
        loop = Loop(
          experiment=self.experiment,
          folder=folder,
          mirror=self.place.mirror,
          checkpoints=checkpoints,
          phases=phases,
          data_digest=self.data_digest,
          journal=written,
          received=received,
          on_round=self.on_round,
          profile=profile,
          singles=profiling.SINGLES if self.profiled else 0,
          ready=ahead.wait,
          **begun._asdict(),
        )
        del begun  # whose state would live as long as the run
        loop.run()
      summary = sum_up(
        loop.experiment,
        simulator,
        loop.state,
        loop.choice,
        loop.count,
        phases,
        folder,
        loop.measured,
        self.data_digest,
      )
    return summary, None if profile is None else profile.write(simulator)

  @contextlib.contextmanager
  def _checkpoints(self) -> Iterator[Checkpoints | None]:
    """Yield the checkpoints of the workdir, which this process holds.

    Yields:
      The checkpoints; None in all processes but those that write.
    """
    folder, timetable = self.place.folder, self.experiment.timetable
    with contextlib.ExitStack() as stack:
      # Nobody changes it any more.
      processes.from_first(lambda: changes.changes_since(folder, self.resolved))
      shared = False
      if self.experiment.simulator.states.spread:
        shared = is_seen_by_all(folder)
        if not shared and processes.is_first():
          warn(
            f"Not all processes see {folder}: the first one gathers the whole"
            " state for each checkpoint. A --workdir on a shared file system"
            " lets each write its part."
          )
      occasion = processes.occasion() if shared else None
      checkpoints: Checkpoints | None = None

      def begin() -> None:
        nonlocal checkpoints
        with as_write_error(folder):
          checkpoints = Checkpoints(
            folder / "checkpoints",
            keep=timetable.keep_checkpoints,
            snapshot_every=timetable.snapshot_every,
            occasion=occasion,
          )
        stack.enter_context(contextlib.closing(checkpoints))

      processes.from_first(begin)
      if shared and not processes.is_first():
        begin()
      yield checkpoints

  @contextlib.contextmanager
  def _outputs(
    self, done: int, begins: bool, simulator: Simulator, trackers: Trackers
  ) -> Iterator[tuple[Journal, profiling.Profile | None]]:
    """Yield where metrics and messages go, and what traces a few dispatches.

    Args:
      done: rounds done.
      begins: whether there is a row of round 0 to write.
      simulator: of the run.
      trackers: of the run.
    """
    folder = self.place.folder
    everyone = simulator.algorithm.requirements.pools_data
    with contextlib.ExitStack() as stack:
      profile = None
      if self.profiled and processes.is_first():
        profile = profiling.Profile(folder / "profile", self.phases)
        stack.enter_context(profile)
      with self.phases("write"):
        written = stack.enter_context(
          journal(
            folder,
            rounds=self.experiment.timetable.rounds,
            done=done,
            trackers=trackers,
            begins=begins,
            log_clients=simulator.log_clients,
            name_of=(lambda _: "all clients")
            if everyone
            else simulator.data.train.client_name,
          )
        )
      yield written, profile

  def _take_over(self, fresh: RunState) -> RunState:
    """Return the state that a branch begins with; copy its first metrics."""
    origin, simulator = self.standing.origin, self.experiment.simulator
    assert origin is not None
    account = account_facts(simulator, origin.round)
    begun = branch.take_over(
      origin, self.experiment, fresh, self.data_digest, account
    )

    def copy() -> None:
      for line in begun.lines:
        warn(line)
      branch.copy_rows(origin, self.place.folder, simulator.log_clients)

    processes.from_first(copy)
    return begun.state

  def _describe(self) -> None:
    """Write what the workdir says of the run, once nothing refuses it."""
    folder, experiment = self.place.folder, self.experiment
    # A run that gets more rounds is not finished, and its config says so.
    (folder / "summary.json").unlink(missing_ok=True)
    origin = self.standing.origin
    beside = {} if origin is None else {changes.ORIGIN: origin._asdict()}
    reporting.write_json(folder / "config.json", {**self.resolved, **beside})
    described = data_profile.profile_of(experiment.simulator.data)
    reporting.write_json(folder / data_profile.FILE, described)
    rounds = experiment.timetable.rounds
    account = privacy.account(experiment.config, experiment.simulator, rounds)
    if account is not None:
      reporting.write_json(folder / composition.FILE, account)
    if self.standing.changed:
      listed = "; ".join(
        f"{k}: {a} -> {b}" for k, (a, b) in self.standing.changed.items()
      )
      warn(f"The run goes on with other settings: {listed}.")
