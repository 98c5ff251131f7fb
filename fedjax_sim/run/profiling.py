"""A profile of a run: a trace of a few rounds, and what training achieved.

The trace is of the process's second, third and fourth dispatch, of one round
each; the first may compile. It ends earlier once it has `MOST_STEPS` local
steps, of which each leaves a line for every operation on a CPU. A profile is
never a reason to lose a run: where it fails, it says so, and the run goes on.

It is of one process: the first of several, since it alone writes the workdir.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim import reporting
from fedjax_sim.reporting import formatting
from fedjax_sim.simulation import costs
from fedjax_sim.simulation.dispatch import DispatchResult
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.simulation.timing import Phases

TRACED = 3  # dispatches, of one round each
SINGLES = 1 + TRACED  # dispatches that have one round each
MOST_STEPS = 5000  # local steps, after which a trace ends


class Trained(NamedTuple):
  """Counts of what some dispatches trained.

  Attributes:
    rounds: how many.
    clients: that trained.
    examples: that they trained on, fillers of partial batches not counted.
    steps: local steps of each pass, those of waiting lanes not counted,
      shape=(passes,).
    seconds: that the calls took.
  """

  rounds: int = 0
  clients: int = 0
  examples: int = 0
  steps: np.ndarray | int = 0
  seconds: float = 0.0

  def plus(self, out: DispatchResult) -> Trained:
    """Return the counts with one more dispatch."""
    return Trained(
      self.rounds + len(out.rows),
      self.clients + out.clients,
      self.examples + out.waste.useful,
      self.steps + out.steps,
      self.seconds + out.seconds,
    )


class Profile:
  """Traces a few dispatches; a context manager, which ends the trace."""

  def __init__(self, folder: Path, phases: Phases):
    """Prepare a profile; nothing is written yet.

    Args:
      folder: where the trace goes; made if it is missing.
      phases: what the run measures.
    """
    self._folder, self._phases = folder, phases
    self._running = False
    self._traced, self._plain = Trained(), Trained()
    self._dispatches = 0
    self._failed = False

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def before(self, left: int) -> None:
    """Begin or end the trace, before a dispatch.

    Args:
      left: rounds that are left.
    """
    begun = self._running or self._traced.rounds or self._failed
    if not begun and (self._dispatches or left == 1):
      self._start()
    elif (
      self._traced.rounds >= TRACED or np.sum(self._traced.steps) >= MOST_STEPS
    ):
      self._stop()

  def after(self, out: DispatchResult) -> None:
    """Count a dispatch."""
    self._dispatches += 1
    if self._running:
      self._traced = self._traced.plus(out)
    else:
      self._plain = self._plain.plus(out)

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function

    def start() -> None:
      self._folder.mkdir(exist_ok=True)
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._running = True

    self._guarded(start)

  def _stop(self) -> None:
    if self._running:
      self._running = False
      self._guarded(jax.profiler.stop_trace)

  def _guarded(self, act: Callable[[], None]) -> None:
    try:
      with self._phases("profile"):
        act()
    except (OSError, RuntimeError, ValueError) as error:
      self._failed = True
      _warn(f"There is no trace: {' '.join(str(error).split())}")

  def write(self, simulator: Simulator) -> dict[str, Any]:
    """Write `phases.json` after the run, and return its content."""
    self._stop()
    # The tracer slows down what it watches.
    trained = self._plain if self._plain.rounds else self._traced
    seconds = self._phases.seconds()  # before the count, which compiles
    found: dict[str, Any] = {
      "phase_seconds": seconds,
      "wall_seconds": sum(seconds.values()),
      **measured(simulator, trained),
      "rounds_traced": self._traced.rounds,
      "trace": None if self._failed else _newest(self._folder),
    }
    try:
      self._folder.mkdir(exist_ok=True)
      reporting.write_json(self._folder / "phases.json", found)
    except OSError as error:
      _warn(f"The profile is not kept: {error}")
    return found


def show(found: dict[str, Any]) -> None:
  """Print what `Profile.write` returned, as a table."""
  reporting.print_phases(found["phase_seconds"], facts(found))


def measured(simulator: Simulator, trained: Trained) -> dict[str, Any]:
  """Return what training achieved a second: clients, examples, operations.

  The operations are XLA's count for a local step, compiled by itself, times
  the steps that clients took: not what lanes compute while they wait, and
  neither aggregation, transforms, server step nor evaluation. The count is for
  a whole batch, so fillers of a partial one are in it.
  """
  seconds = max(trained.seconds, 1e-9)
  flops, reason = _flops(simulator, trained)
  return {
    "rounds_measured": trained.rounds,
    "train_seconds_measured": trained.seconds,
    "clients_per_second": trained.clients / seconds,
    "examples_per_second": trained.examples / seconds,
    "flops": flops,
    "flops_per_second": None if flops is None else flops / seconds,
    "flops_per_second_and_device": None
    if flops is None
    else flops / seconds / simulator.mesh.devices.size,
    "flops_unknown": reason,
  }


def _flops(
  simulator: Simulator, trained: Trained
) -> tuple[float | None, str | None]:
  """Return the operations of all steps and None, or None and the reason."""
  if not trained.rounds:
    return None, "No round was left to train."
  try:
    each = costs.costs_of(simulator).step_flops
  except (ValueError, RuntimeError) as error:  # the latter is XLA's
    return None, " ".join(str(error).split())
  if not (np.isfinite(each) & (each > 0)).all():
    return None, "XLA does not count this model's operations."
  return float(trained.steps @ each), None


def facts(found: dict[str, Any]) -> dict[str, str]:
  """Return the lines below the table: name -> text."""
  number = formatting.number
  achieved = found["flops_per_second"]
  if achieved is None:
    rate = f"unknown: {found['flops_unknown']}"
  else:
    device = found["flops_per_second_and_device"]
    rate = (
      f"{number(achieved / 1e9)} GFLOP/s, {number(device / 1e9)} a device"
      " (local steps, by XLA's count)"
    )
  lines = {
    "clients/s": number(found["clients_per_second"]),
    "examples/s": number(found["examples_per_second"]),
    "achieved": rate,
    "measured in": f"{found['rounds_measured']} rounds",
  }
  if (trace := found["trace"]) is not None:
    lines["trace"] = trace
    lines["to open it"] = (
      "*.trace.json.gz at https://ui.perfetto.dev, or the profile folder with"
      " `pip install xprof` and `xprof --logdir=FOLDER`"
    )
  return lines


def _newest(folder: Path) -> str | None:
  """Return the folder of the last trace; None without one."""
  traces = sorted(folder.glob("plugins/profile/*/"))
  return str(traces[-1]) if traces else None


def _warn(message: str) -> None:
  print(message, file=sys.stderr)  # noqa: T201
