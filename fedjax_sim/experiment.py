"""A run in a workdir: resume, train, evaluate, log, checkpoint, sum up.

The workdir holds `config.json`, `metrics.jsonl`, `timings.jsonl`, `events/`,
`checkpoints/`, and at the end `summary.json`, `curves.png` and
`clients_*.csv`. Running on the same workdir goes on where the newest whole
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
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim import reporting
from fedjax_sim.checkpoint import Checkpoints, tree_digest
from fedjax_sim.cohort import Waste
from fedjax_sim.config import Experiment
from fedjax_sim.round import RunState
from fedjax_sim.simulate import Dispatch, Row, Simulator


class ConfigChangedError(ValueError):
  """The workdir belongs to a run with another config."""


class WorkdirError(OSError):
  """The workdir cannot be used."""


class Interrupted(Exception):
  """A signal ended the run after a checkpoint."""

  def __init__(self, number: int, round_: int, workdir: Path):
    self.exit_code = 128 + number
    super().__init__(
      f"{signal.Signals(number).name} in round {round_}; a checkpoint is in"
      f" {workdir}. Run the same command again to go on."
    )


@dataclasses.dataclass(kw_only=True)
class Totals:
  """What a run has done so far; a resumed one goes on counting."""

  clients: int = 0
  useful: int = 0
  computed: int = 0
  train_seconds: float = 0.0
  wall_seconds: float = 0.0

  def add(self, out: Dispatch) -> None:
    """Counts a dispatch."""
    waste: Waste = out.waste
    self.clients += out.clients
    self.useful += waste.useful
    self.computed += waste.useful + waste.batch + waste.step
    self.train_seconds += out.seconds

  @property
  def clients_per_second(self) -> float:
    """Clients trained a second, evaluation and planning not counted."""
    return self.clients / max(self.train_seconds, 1e-9)


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Runs a config in a workdir, or goes on with it.

  Args:
    config: complete, as a config file returns it.
    workdir: made if it is missing.

  Returns:
    The summary, as in `summary.json`.

  Raises:
    ConfigChangedError: the workdir holds a run with another config.
    WorkdirError: it cannot be written, or another process uses it.
    Interrupted: SIGTERM or SIGINT; a checkpoint was written.
    TypeError, ValueError, OSError: the config is wrong; nothing was written.
  """
  began = time.perf_counter()
  folder = Path(workdir)
  resolved = configs.resolved(config)
  _refuse_other_config(folder, resolved)
  finished = _finished(folder)
  if finished is not None:
    print(f"The run in {folder} is finished.")  # noqa: T201
    _print_summary(finished, folder)
    return finished
  experiment = configs.build(config)
  with _locked(folder):
    reporting.write_json(folder / "config.json", resolved)
    checkpoints = Checkpoints(
      folder / "checkpoints", keep=experiment.schedule.keep_checkpoints
    )
    with contextlib.closing(checkpoints):
      summary = _run(experiment, folder, checkpoints, began)
  _print_summary(summary, folder)
  return summary


def _run(
  experiment: Experiment,
  folder: Path,
  checkpoints: Checkpoints,
  began: float,
) -> dict[str, Any]:
  """Restores or begins, runs to the end, and sums up."""
  simulator, schedule = experiment.simulator, experiment.schedule
  warnings: list[str] = []
  restored = checkpoints.restore(simulator.state_shapes, warnings.append)
  totals, done = Totals(), 0
  if restored is not None:
    done = restored.round
    totals = Totals(**restored.facts["totals"])
    # The lanes were measured when the run began; its float sums follow them.
    speed = dataclasses.replace(
      simulator.runtime, lanes=restored.facts["lanes"]
    )
    simulator = dataclasses.replace(simulator, runtime=speed)
    state = simulator.place(restored.state)
  else:
    state = simulator.init()
  earlier = totals.wall_seconds

  def facts() -> dict[str, Any]:
    totals.wall_seconds = earlier + time.perf_counter() - began
    return {
      "lanes": simulator.lane_choice.lanes,
      "totals": dataclasses.asdict(totals),
      "versions": _versions(),
    }

  with (
    reporting.MetricsFile(
      folder / "metrics.jsonl", keep_through=done
    ) as metrics,
    reporting.MetricsFile(
      folder / "timings.jsonl", keep_through=done, complete=False
    ) as timings,
    contextlib.closing(
      reporting.EventFiles(folder / "events", first_round=done + 1)
    ) as events,
    reporting.Progress(schedule.rounds, done=done) as progress,
    _signals() as received,
  ):
    for warning in warnings:
      progress.log(warning, level="warning")
    if restored is not None:
      progress.log(f"Going on after round {done}.")
      if restored.facts["versions"] != _versions():
        progress.log(
          "Software versions changed since the checkpoint, from"
          f" {restored.facts['versions']} to {_versions()}; results may"
          " differ in the last digits.",
          level="warning",
        )
    choice = simulator.lane_choice
    progress.log(f"{choice.lanes} lanes a device: {choice.reason}.")

    def save(round_: int, state: RunState) -> None:
      metrics.sync()
      timings.sync()
      events.flush()
      checkpoints.save(round_, state, facts())

    if restored is None:
      save(0, state)
    saved = done
    stops = (schedule.eval_every, schedule.checkpoint_every)
    dispatches = simulator.run(state, schedule.rounds, stops=stops)
    sent: RunState | None = None
    while done < schedule.rounds:
      out = dispatches.send(sent)
      state = out.state
      done += len(out.rows)
      totals.add(out)
      eval_began = time.perf_counter()
      if done % schedule.eval_every == 0 or done == schedule.rounds:
        evaluated = simulator.evaluate(state)
        out.rows[-1].update(evaluated)
        state = simulator.react(state, evaluated)
      sent = state
      metrics.append(out.rows)
      events.write(out.rows)
      timings.append([_timing(done, out, time.perf_counter() - eval_began)])
      for round_, ids in out.rejected:
        progress.log(_rejection(simulator, round_, ids), level="warning")
      rate = out.clients / max(out.seconds, 1e-9)
      for row in out.rows:
        progress.update(row, clients_per_second=rate)
      if (
        done % schedule.checkpoint_every == 0
        or done == schedule.rounds
        or received
      ):
        save(done, state)
        saved = done
      if received and done < schedule.rounds:
        raise Interrupted(received[0], saved, folder)

  return _sum_up(simulator, state, totals, folder, facts()["totals"])


def _timing(done: int, out: Dispatch, evaluation: float) -> Row:
  return {
    "round": done,
    "rounds": len(out.rows),
    "train_seconds": out.seconds,
    "plan_seconds": out.plan_seconds,
    "eval_seconds": evaluation,
  }


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
  simulator: Simulator,
  state: RunState,
  totals: Totals,
  folder: Path,
  counted: dict[str, Any],
) -> dict[str, Any]:
  """Writes what a finished run leaves; `summary.json` last."""
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  reporting.draw_curves(rows, folder / "curves.png", folder.name)
  for name in ("seen", "unseen"):
    if name in simulator.evaluation_sets:
      _write_clients(simulator, state, name, folder / f"clients_{name}.csv")
  params = simulator.algorithm.variables(state.server).params
  last = {k: v for k, v in rows[-1].items() if k != "round"}
  device = simulator.mesh.devices.flat[0]
  summary = {
    **last,
    "params_digest": tree_digest(params),
    "rounds": int(state.round),
    "seed": simulator.seed,
    "parameters": simulator.num_parameters,
    "wall_seconds": counted["wall_seconds"],
    "train_seconds": totals.train_seconds,
    "clients_per_second": totals.clients_per_second,
    "examples_per_second": totals.useful / max(totals.train_seconds, 1e-9),
    "padding_waste": 1 - totals.useful / max(totals.computed, 1),
    "compilations": simulator.compilations,
    "lanes": simulator.lane_choice.lanes,
    "lanes_reason": simulator.lane_choice.reason,
    "devices": [str(d) for d in simulator.mesh.devices.flat],
    "device_kind": device.device_kind,
    "versions": _versions(),
  }
  reporting.write_json(folder / "summary.json", summary)
  return summary


def _write_clients(
  simulator: Simulator, state: RunState, name: str, path: Path
) -> None:
  """Every client's own metrics, one line a client."""
  data = getattr(simulator.data, name)
  metrics = simulator.evaluate_clients(state, name).per_client()
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["client", "examples", *metrics])
  for i, size in enumerate(data.sizes):
    values = [float(v[i]) for v in metrics.values()]
    writer.writerow([data.client_name(i), int(size), *values])
  reporting.write_atomically(path, text.getvalue().encode())


def _versions() -> dict[str, str]:
  names = ("fedjax_sim", "jax", "jaxlib", "flax", "optax", "numpy")
  versions = {"python": platform.python_version()}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"  # run from a source tree
  return versions


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
  shown = ("train/", "test/", "seen/", "unseen/")
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
  reporting.print_final_table(metrics, facts)


def _read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); remove it, or take another --workdir."
    ) from error


def _refuse_other_config(folder: Path, resolved: dict[str, Any]) -> None:
  path = folder / "config.json"
  if not path.exists():
    return
  changed = configs.differences(_read_json(path), resolved)
  if changed:
    raise ConfigChangedError(
      f"The run in {folder} has another config: {'; '.join(changed)}. Take"
      " another --workdir, or the config that it began with."
    )


def _finished(folder: Path) -> dict[str, Any] | None:
  path = folder / "summary.json"
  return _read_json(path) if path.exists() else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Makes the workdir and keeps other processes out of it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
  except OSError as error:
    raise WorkdirError(
      f"--workdir={folder} cannot be written: {error}. Name a folder that can."
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
  """Collects the first SIGTERM or SIGINT; a second acts as usual."""
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return
  before = {}

  def note(number: int, frame: FrameType | None) -> None:
    del frame
    received.append(number)
    for s, handler in before.items():
      signal.signal(s, handler)

  for s in (signal.SIGTERM, signal.SIGINT):
    before[s] = signal.signal(s, note)
  try:
    yield received
  finally:
    for s, handler in before.items():
      signal.signal(s, handler)
