"""A run in a workdir: resume, train, evaluate, log, checkpoint, sum up.

The workdir holds `config.json`, `metrics.jsonl`, `timings.jsonl`, `events/`,
`checkpoints/`, of a private run `privacy.json`, and at the end `summary.json`,
`curves.png` and `clients_*.csv`; with `server.client_log` also
`client_rounds/`, which at the end becomes `client_rounds.parquet` and
`client_rounds.png`. Running on the same workdir goes on where the newest whole
checkpoint ends; the metrics are cut back to it, so no line is lost or doubled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
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
from fedjax_sim.core import references
from fedjax_sim.distributed import processes
from fedjax_sim.engine.state import RunState
from fedjax_sim.privacy.accounting import composition
from fedjax_sim.run import profiling
from fedjax_sim.run.checkpoint import (
  Checkpoints,
)
from fedjax_sim.run.resume import (
  Totals,
  account_facts,
  data_digest,
  environment,
  refuse_other_account,
  refuse_other_data,
  restore,
  versions,
  warn_of_changes,
)
from fedjax_sim.run.signals import Interrupted, noted_signals
from fedjax_sim.run.summary import print_summary, rejection, sum_up
from fedjax_sim.run.tracking import journal
from fedjax_sim.run.workdir import (
  as_write_error,
  finished_summary,
  locked,
  refuse_other_config,
)
from fedjax_sim.simulation.lanes import Choice
from fedjax_sim.simulation.timing import Phases


def run(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  on_round: Callable[[int], None] = lambda round_: None,
  *,
  profile: bool = False,
) -> dict[str, Any]:
  """Runs a config in a workdir, or goes on with it.

  With several processes all of them call it; the first one alone reads and
  writes the workdir.

  Args:
    config: complete, as a config file returns it.
    workdir: made if it is missing.
    on_round: is told how many rounds are done.
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
  resolved = configs.resolved(config)

  def look() -> dict[str, Any] | None:
    refuse_other_config(folder, resolved)
    return finished_summary(folder)

  if (finished := processes.from_first(look)) is not None:
    if processes.is_first():
      nothing = "nothing is left to profile, and " if profile else ""
      print(  # noqa: T201
        f"The run in {folder} is finished; {nothing}for more rounds take"
        " another --workdir."
      )
      print_summary(finished, folder)
    return finished

  def start() -> tuple[build.Experiment, dict[str, Any]]:
    with phases("build"):
      experiment = build.build(config)
      with references.named(dict(configs.fields_of(config))):
        experiment.simulator.trace()
      digest = data_digest(experiment.simulator)
    fields = dict(configs.fields_of(ConfigDict(resolved)))
    # A path may be another on every host; what lies there may not. So of
    # references.
    fields.pop("data.path")
    fields.update(experiment.sources)
    same = {
      "--profile": profile,  # it changes the rounds of a dispatch
      "devices of a process": jax.local_device_count(),
      "widest float": str(jax.dtypes.canonicalize_dtype(np.float64)),
    }
    return experiment, {**fields, **versions(), **same, "data": digest}

  experiment, facts = processes.check_same(start)
  keep = experiment.timetable.keep_checkpoints
  saved = folder / "checkpoints"
  with contextlib.ExitStack() as stack:
    checkpoints: Checkpoints | None = None

    def prepare() -> None:
      nonlocal checkpoints
      stack.enter_context(locked(folder))
      refuse_other_config(folder, resolved)  # nobody can change it any more
      with as_write_error(folder):
        reporting.write_json(folder / "config.json", resolved)
        rounds = experiment.timetable.rounds
        told = privacy.account(config, experiment.simulator, rounds)
        if told is not None:
          reporting.write_json(folder / composition.FILE, told)
        checkpoints = Checkpoints(saved, keep=keep)
        stack.enter_context(contextlib.closing(checkpoints))

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
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Restores or begins, runs to the end, and sums up; summary and profile."""
  simulator, timetable = experiment.simulator, experiment.timetable
  with phases("checkpoint"):
    restored = restore(checkpoints, simulator)
  if restored is None:
    with phases("build"):
      done, state, before = 0, simulator.init(), Totals()
    choice = simulator.choose_lanes(timetable.rounds, phases)
  else:
    refuse_other_data(restored.facts["data"], data_digest)
    refuse_other_account(
      restored.facts.get("privacy", {}),
      account_facts(simulator, restored.round),
    )
    done, before = restored.round, Totals(**restored.facts["totals"])
    # The lanes were measured when the run began; its float sums follow them.
    choice = Choice(*restored.facts["lanes"])
    runtime = dataclasses.replace(simulator.runtime, lanes=choice.lanes)
    simulator = dataclasses.replace(simulator, runtime=runtime)
    state = simulator.place(restored.state)
    restored = restored._replace(state=None)  # the host's copy may be large
    if processes.is_first():
      facts = restored.facts
      warn_of_changes(facts["environment"], environment(simulator))
      warn_of_changes(
        facts.get("sources", {}),  # those of old checkpoints had none
        experiment.sources,
        "The rounds to come follow the new code",
      )
      warn_of_changes(
        facts.get("privacy", {}),
        account_facts(simulator, done),
        "The accountant's libraries are other ones; both epsilons are bounds",
      )
  totals = dataclasses.replace(before)

  def count() -> Totals:
    """The totals at this moment."""
    seconds, earlier = phases.seconds(), before.phase_seconds
    totals.phase_seconds = {
      name: earlier.get(name, 0.0) + value for name, value in seconds.items()
    }
    totals.wall_seconds = before.wall_seconds + sum(seconds.values())
    totals.compilations = before.compilations + simulator.compilations
    return totals

  with (
    profiling.Profile(folder / "profile", phases)
    if profiled and processes.is_first()
    else contextlib.nullcontext() as profile,
    contextlib.ExitStack() as stack,
  ):
    with phases("write"):
      told = stack.enter_context(
        journal(
          folder,
          rounds=timetable.rounds,
          done=done,
          begins=done == 0 and timetable.initial_eval,
          log_clients=simulator.log_clients,
          name_of=simulator.data.train.client_name
          if not simulator.algorithm.requirements.pools_data
          else lambda _: "all clients",
        )
      )
    if restored is not None:
      told.log(f"Going on after round {done}.")
    lanes = "1 lane" if choice.lanes == 1 else f"{choice.lanes} lanes"
    told.log(f"{lanes} a device: {choice.reason}.")
    for slow in simulator.slow_layers:
      told.log(f"Slow: {slow}.", level="warning")
    if experiment.budget_end:
      told.log(f"The privacy budget {experiment.budget_end}.")

    def save() -> None:
      """Commits all that was done."""
      fetched = simulator.fetch(state)

      def write() -> None:
        assert checkpoints is not None
        told.sync()
        facts = {
          "lanes": choice,
          "totals": dataclasses.asdict(count()),
          "environment": environment(simulator),
          "data": data_digest,
          "sources": experiment.sources,
          "privacy": account_facts(simulator, done),
        }
        checkpoints.save(done, fetched, facts)

      processes.from_first(write)

    if restored is None:
      with phases("checkpoint"):
        save()
    with phases("evaluate"):
      _ = simulator.evaluation_sets  # what is wrong with them shows now
    saved = done
    on_round(done)
    sent: RunState | None = None
    if done == 0 and (sets := timetable.evaluated(0)):
      with phases("evaluate"):
        evaluated = simulator.evaluate(state, sets)
        state = simulator.react(state, evaluated)
      told.begin({"round": 0, **evaluated})
    dispatches = stack.enter_context(
      contextlib.closing(
        simulator.run(
          state,
          timetable.rounds,
          stops=timetable.stops,
          phases=phases,
          singles=profiling.SINGLES if profiled else 0,
        )
      )
    )
    while done < timetable.rounds:
      # A signal may reach one process alone, and all have to stop together.
      (signalled,) = processes.greatest(received[0] if received else 0)
      if signalled:
        if saved < done:
          with phases("checkpoint"):
            save()
        raise Interrupted(int(signalled), done, folder)
      if profile is not None:
        profile.before(timetable.rounds - done)
      out = dispatches.send(sent)
      if profile is not None:
        profile.after(out)
      done += len(out.rows)
      totals.add(out)
      state = out.state
      eval_began = time.perf_counter()
      sets = timetable.evaluated(done)
      if sets and out.failure is None:
        with phases("evaluate"):
          evaluated = simulator.evaluate(state, sets)
          out.rows[-1].update(evaluated)
          for metric in simulator.watched_metrics:
            if math.isnan(evaluated.get(metric, 0.0)):
              told.log(
                f"Round {done}: {metric} is NaN, which is no better value.",
                level="warning",
              )
          ends = done == timetable.rounds
          state = simulator.react(state, evaluated, ends=ends)
      sent = state
      with phases("write"):
        told.write(done, out, time.perf_counter() - eval_began)
      for round_, ids in out.rejected:
        told.log(rejection(simulator, round_, ids), level="warning")
      if out.failure is not None:
        raise out.failure
      if done % timetable.checkpoint_every == 0 or done == timetable.rounds:
        with phases("checkpoint"):
          save()
        saved = done
      on_round(done)

  summary = sum_up(experiment, simulator, state, choice, count, phases, folder)
  return summary, None if profile is None else profile.write(simulator)
