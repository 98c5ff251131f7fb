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
import csv
import dataclasses
import fcntl
import importlib.metadata
import io
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim import distributed, reporting
from fedjax_sim.config import build
from fedjax_sim.config.build import privacy
from fedjax_sim.core import references, validate
from fedjax_sim.data import FederatedData, StoredData
from fedjax_sim.distributed import processes
from fedjax_sim.engine.evaluation import ClientMetrics
from fedjax_sim.engine.round import RunState
from fedjax_sim.privacy.accounting import composition
from fedjax_sim.run import profiling
from fedjax_sim.run.checkpoint import (
  Checkpoints,
  Restored,
  rounds_in,
  tree_digest,
)
from fedjax_sim.run.tracking import journal
from fedjax_sim.simulation.dispatch import Dispatch
from fedjax_sim.simulation.lanes import Choice
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.simulation.timing import Phases

REPEATED_SECONDS = 2.0  # within which a signal is the same one again


class ConfigChangedError(ValueError):
  """The workdir belongs to a run with another config, or with other data."""


class WorkdirError(OSError):
  """The workdir cannot be used."""


class WriteError(RuntimeError):
  """A result could not be written; what the last checkpoint holds is safe."""


class Interrupted(Exception):
  """A signal ended the run after a checkpoint."""

  def __init__(self, number: int, round_: int, workdir: Path):
    self.exit_code = 128 + number
    super().__init__(
      f"{signal.Signals(number).name}: stopped after round {round_}, of which a"
      f" checkpoint is in {workdir}. Run the same command again to go on."
    )


@dataclasses.dataclass(kw_only=True)
class Totals:
  """What a run has done so far; a resumed one goes on counting."""

  clients: int = 0
  useful: int = 0
  computed: int = 0
  idle: int = 0
  train_seconds: float = 0.0
  wall_seconds: float = 0.0
  compilations: int = 0
  phase_seconds: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, out: Dispatch) -> None:
    """Counts a dispatch."""
    self.clients += out.clients
    self.useful += out.waste.useful
    self.computed += out.waste.computed
    self.idle += out.waste.idle
    self.train_seconds += out.seconds

  @property
  def clients_per_second(self) -> float:
    """Clients trained a second, evaluation and planning not counted."""
    return self.clients / max(self.train_seconds, 1e-9)


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
    _refuse_other_config(folder, resolved)
    return _finished(folder)

  if (finished := processes.from_first(look)) is not None:
    if processes.is_first():
      nothing = "nothing is left to profile, and " if profile else ""
      print(  # noqa: T201
        f"The run in {folder} is finished; {nothing}for more rounds take"
        " another --workdir."
      )
      _print_summary(finished, folder)
    return finished

  def start() -> tuple[build.Experiment, dict[str, Any]]:
    with phases("build"):
      experiment = build.build(config)
      with references.named(dict(configs.fields_of(config))):
        experiment.simulator.trace()
      digest = _data_digest(experiment.simulator)
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
    return experiment, {**fields, **_versions(), **same, "data": digest}

  experiment, facts = processes.check_same(start)
  keep = experiment.timetable.keep_checkpoints
  saved = folder / "checkpoints"
  with contextlib.ExitStack() as stack:
    checkpoints: Checkpoints | None = None

    def prepare() -> None:
      nonlocal checkpoints
      stack.enter_context(_locked(folder))
      _refuse_other_config(folder, resolved)  # nobody can change it any more
      with _as_write_error(folder):
        reporting.write_json(folder / "config.json", resolved)
        rounds = experiment.timetable.rounds
        told = privacy.account(config, experiment.simulator, rounds)
        if told is not None:
          reporting.write_json(folder / composition.FILE, told)
        checkpoints = Checkpoints(saved, keep=keep)
        stack.enter_context(contextlib.closing(checkpoints))

    with phases("checkpoint"):
      processes.from_first(prepare)
    received = stack.enter_context(_signals())
    with _as_write_error(folder):
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
    _print_summary(summary, folder)
  if profiled is not None:
    profiling.show(profiled)
  return summary


@contextlib.contextmanager
def _as_write_error(folder: Path) -> Iterator[None]:
  """Names the checkpoint that is left where the disk refuses."""
  try:
    yield
  except OSError as error:
    kept = rounds_in(folder / "checkpoints")
    where = f"{error.filename}: " if error.filename else ""
    raise WriteError(
      f"The run in {folder} stopped: {where}{error.strerror or error}. "
      + (f"The checkpoint of round {kept[-1]} is intact. " if kept else "")
      + "Make room or correct the folder, and run the same command again."
    ) from error


def _restore(
  checkpoints: Checkpoints | None, simulator: Simulator
) -> Restored | None:
  """The newest whole checkpoint, which process 0 reads, on all."""
  shapes = simulator.fetched_shapes
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

  def read() -> tuple[int, dict[str, Any]] | None:
    nonlocal state
    assert checkpoints is not None
    restored = checkpoints.restore(shapes, _warn)
    if restored is None:
      return None
    state = restored.state
    return restored.round, restored.facts

  told = processes.from_first(read)
  if told is None:
    return None
  round_, facts = told
  return Restored(round_, processes.arrays_from_first(state), facts)


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
    restored = _restore(checkpoints, simulator)
  if restored is None:
    with phases("build"):
      done, state, before = 0, simulator.init(), Totals()
    choice = simulator.choose_lanes(timetable.rounds, phases)
  else:
    _refuse_other_data(restored.facts["data"], data_digest)
    _refuse_other_account(
      restored.facts.get("privacy", {}), _privacy(simulator, restored.round)
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
      _warn_of_changes(facts["environment"], _environment(simulator))
      _warn_of_changes(
        facts.get("sources", {}),  # those of old checkpoints had none
        experiment.sources,
        "The rounds to come follow the new code",
      )
      _warn_of_changes(
        facts.get("privacy", {}),
        _privacy(simulator, done),
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
          if not simulator.algorithm.pooled
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
          "environment": _environment(simulator),
          "data": data_digest,
          "sources": experiment.sources,
          "privacy": _privacy(simulator, done),
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
        told.log(_rejection(simulator, round_, ids), level="warning")
      if out.failure is not None:
        raise out.failure
      if done % timetable.checkpoint_every == 0 or done == timetable.rounds:
        with phases("checkpoint"):
          save()
        saved = done
      on_round(done)

  summary = _sum_up(experiment, simulator, state, choice, count, phases, folder)
  return summary, None if profile is None else profile.write(simulator)


def _rejection(simulator: Simulator, round_: int, ids: Any) -> str:
  name = simulator.data.train.client_name
  named = (
    ["the pooled data"]
    if simulator.algorithm.pooled
    else [name(int(i)) for i in ids[:10]]
  )
  more = ", ..." if len(ids) > 10 else ""
  return (
    f"Round {round_}: left out, update not finite: {', '.join(named)}{more}"
  )


def _sum_up(
  experiment: build.Experiment,
  simulator: Simulator,
  state: RunState,
  choice: Choice,
  count: Callable[[], Totals],
  phases: Phases,
  folder: Path,
) -> dict[str, Any]:
  """Writes what a finished run leaves; `summary.json` last."""
  with phases("evaluate"):
    clients = {
      name: simulator.evaluate_clients(state, name)
      for name in ("seen", "unseen")
      if name in simulator.evaluation_sets
    }
  params = simulator.algorithm.variables(state.server).params
  digest, rounds = tree_digest(distributed.fetch(params)), int(state.round)
  best, audited = simulator.best(state), simulator.audit(state)

  def write() -> dict[str, Any]:
    rows = reporting.read_metrics(folder / "metrics.jsonl")
    with phases("write"):
      reporting.draw_curves(rows, folder / "curves.png", folder.name)
      parts, table = folder / "client_rounds", folder / "client_rounds.parquet"
      if simulator.log_clients:
        reporting.join_client_rounds(parts, table)
        image = folder / "client_rounds.png"
        reporting.draw_client_rounds(table, image, folder.name)
      for name, metrics in clients.items():
        data = getattr(simulator.data, name)
        _write_clients(data, metrics, folder / f"clients_{name}.csv")
    totals = count()
    last = {k: v for k, v in rows[-1].items() if k != "round"}
    device = simulator.mesh.devices.flat[0]
    summary = {
      **last,
      **best,
      "params_digest": digest,
      "rounds": rounds,
      "seed": simulator.seed,
      "noise_seed": simulator.noise_seed,
      "parameters": simulator.num_parameters,
      "wall_seconds": totals.wall_seconds,
      "phase_seconds": totals.phase_seconds,
      "train_seconds": totals.train_seconds,
      "clients_per_second": totals.clients_per_second,
      "examples_per_second": totals.useful / max(totals.train_seconds, 1e-9),
      "padding_waste": 1 - totals.useful / max(totals.computed, 1),
      "device_idle": totals.idle / max(totals.computed + totals.idle, 1),
      "compilations": totals.compilations,
      "lanes": choice.lanes,
      "lanes_reason": choice.reason,
      "residency": simulator.residency.name,
      "residency_reason": simulator.residency.why,
      "processes": jax.process_count(),
      "devices": [str(d) for d in simulator.mesh.devices.flat],
      "device_kind": device.device_kind,
      "versions": _versions(),
    }
    if simulator.ledger is not None:
      summary["privacy"] = simulator.ledger.facts(rounds)
      summary["privacy_told"] = simulator.ledger.describe(rounds)
    if simulator.noise_origin:
      summary["privacy_noise"] = simulator.noise_origin
    if experiment.budget_end:
      summary["privacy_budget"] = experiment.budget_end
    if audited is not None:
      summary["privacy_audit"] = audited._asdict()
      summary["privacy_audit_told"] = audited.describe()
    if experiment.local_guarantee:
      summary["local_privacy"] = experiment.local_guarantee
    if experiment.secure_noise:
      summary["secure_noise"] = experiment.secure_noise
    if experiment.uncovered:
      summary["privacy_not_covered"] = list(experiment.uncovered)
    reporting.write_json(folder / "summary.json", summary)
    if simulator.log_clients:  # until now the run might have had to go back
      reporting.remove_parts(parts)
    return summary

  return processes.from_first(write)


def _write_clients(
  data: FederatedData, evaluated: ClientMetrics, path: Path
) -> None:
  """Every client's own metrics, one line a client."""
  metrics = evaluated.per_client()
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["client", "examples", *metrics])
  for i, size in enumerate(data.sizes):
    values = [float(v[i]) for v in metrics.values()]
    writer.writerow([data.client_name(i), int(size), *values])
  reporting.write_atomically(path, text.getvalue().encode())


def _versions() -> dict[str, str]:
  names = [
    *("fedjax_sim", "jax", "jaxlib", "flax", "optax", "numpy"),
    *("dp-accounting", "jax-privacy"),
  ]
  versions = {"python": platform.python_version()}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"  # run from a source tree
  return versions


def _environment(simulator: Simulator) -> dict[str, str]:
  """What may change the last digits of a result."""
  devices = simulator.mesh.devices
  kind = devices.flat[0].device_kind
  if simulator.runtime.deterministic_reduction is None:
    kind = f"{devices.size} x {kind}"
  return {"devices": kind, **_versions()}


def _data_digest(simulator: Simulator) -> str:
  """Of what clients train on."""
  tables = dict(simulator.data.tables)
  return tree_digest(
    [
      np.frombuffer(bytes.fromhex(d.digest), np.uint8)
      if isinstance(d, StoredData)
      else (d.offsets, dict(d.examples))
      for d in simulator.data.all_splits.values()
    ]
    + [tables] * bool(tables)
  )


def _refuse_other_data(before: str, now: str) -> None:
  if before != now:
    raise ConfigChangedError(
      "The training data are not those that the run began with; restore what"
      " data.path (or FEDJAX_SIM_DATA) named, or take another --workdir."
    )


def _refuse_other_account(
  before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
  """Refuses to go on where rounds done would be counted as they were not."""
  told = lambda facts: {k: v for k, v in facts.items() if k != "epsilon"}
  if changed := validate.differences(told(before), told(now)):
    raise ConfigChangedError(
      "What the epsilon of the rounds done rests on is not what the run began"
      f" with: {'; '.join(changed)}. Restore your own sampler or algorithm, or,"
      " where noise was fitted, the libraries' versions; or take another"
      " --workdir."
    )


def _privacy(simulator: Simulator, done: int) -> dict[str, Any]:
  """The account of so many rounds; empty without privacy."""
  return {} if simulator.ledger is None else simulator.ledger.facts(done)


def _warn_of_changes(
  before: Mapping[str, str],
  now: Mapping[str, str],
  effect: str = "Results may differ in the last digits",
) -> None:
  changed = validate.differences(before, now)
  if changed:
    _warn(
      f"Since the checkpoint there changed: {'; '.join(changed)}. {effect}."
    )


def _warn(message: str) -> None:
  print(message, file=sys.stderr)  # noqa: T201


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
  shown = ("train/", "test/", "seen/", "unseen/", "best/", "privacy/")
  metrics = {
    k: v
    for k, v in summary.items()
    if k.startswith(shown) and isinstance(v, int | float)
  }
  facts = {
    "rounds": str(summary["rounds"]),
    "wall time": f"{summary['wall_seconds']:.1f} s",
    "clients/s": f"{summary['clients_per_second']:,.0f}",
    "examples/s": f"{summary['examples_per_second']:,.0f}",
    "padding waste": f"{100 * summary['padding_waste']:.1f} %",
    "compilations": str(summary["compilations"]),
    "devices": f"{len(summary['devices'])} x {summary['device_kind']}",
    "lanes": str(summary["lanes"]),
    "workdir": str(folder),
  }
  if "privacy_told" in summary:
    simulated = "privacy/simulated_epsilon" in summary
    told = summary["privacy_told"]
    facts["privacy, simulated" if simulated else "privacy"] = told
  if "privacy_noise" in summary:
    facts["noise"] = summary["privacy_noise"]
  if "privacy_budget" in summary:
    facts["privacy budget"] = summary["privacy_budget"]
  if "local_privacy" in summary:
    facts["local privacy"] = summary["local_privacy"]
  if "secure_noise" in summary:
    facts["secure noise"] = summary["secure_noise"]
  if "privacy_audit_told" in summary:
    facts["audit"] = summary["privacy_audit_told"]
  if "privacy_not_covered" in summary:
    told = ", ".join(summary["privacy_not_covered"])
    facts["not covered by epsilon"] = told
  reporting.print_final_table(metrics, facts)


def _refuse_other_config(folder: Path, resolved: dict[str, Any]) -> None:
  path = folder / "config.json"
  if not path.exists():
    if (folder / "summary.json").exists() or (folder / "checkpoints").exists():
      raise WorkdirError(
        f"{folder} holds a run, but its config.json is missing; restore it, or"
        " take another --workdir."
      )
    return
  try:
    stored = json.loads(path.read_bytes())
    changed = configs.differences(stored, resolved)
  except (ValueError, AttributeError) as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); restore it, or take another --workdir."
    ) from error
  if changed:
    raise ConfigChangedError(
      f"The run in {folder} has another config: {'; '.join(changed)}. Take"
      " another --workdir, or the config that it began with."
    )


def _finished(folder: Path) -> dict[str, Any] | None:
  """The summary of a finished run."""
  path = folder / "summary.json"
  if not path.exists():
    return None
  try:
    summary: dict[str, Any] = json.loads(path.read_bytes())
    _ = summary["lanes"], summary["rounds"]
  except (ValueError, KeyError, TypeError) as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); remove it, and run the same command again."
    ) from error
  return summary


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Makes the workdir and keeps other processes out of it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
  except FileExistsError as error:
    raise WorkdirError(
      f"--workdir={folder} is a file; name a folder."
    ) from error
  except OSError as error:
    raise WorkdirError(
      f"--workdir={folder} cannot be written: {error.strerror}; name another."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise WorkdirError(
        f"--workdir={folder} is in use by another process; wait for it, or"
        " take another."
      ) from None
    yield


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Collects the first SIGTERM or SIGINT; a second acts as usual.

  But not at once where there are several processes: batch systems signal a
  process and its parent, which passes it on.
  """
  patience = REPEATED_SECONDS if jax.process_count() > 1 else 0.0
  began = 0.0
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return
  before: dict[int, Any] = {}

  def usual() -> None:
    for number, handler in before.items():
      # None: it was not installed from Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def note(number: int, frame: FrameType | None) -> None:
    nonlocal began
    del frame
    now = time.monotonic()
    if received and now - began < patience:
      return
    received.append(number)
    began = now
    if len(received) > 1:
      usual()
      signal.raise_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    before[number] = signal.signal(number, note)
  try:
    yield received
  finally:
    usual()
