"""The engine against a bare loop and PyTorch, over the same batches.

    python -m benchmarks.engine --cases=lr,cnn --json=engine.json
    python -m benchmarks.engine --devices=1 --lanes=1,8,32,auto --seconds=60

In turns, within one process: rounds of the engine on one device and on all
(planning overlapped, state donated, as in `Simulator.run`), plain SGD in one
compiled loop on one device (`benchmarks.bare`), and a plain PyTorch loop
(`benchmarks.pytorch`). A ratio is the median over turns, so a machine that is
slow for a while is slow for all.

One device of a CPU is not one core: XLA divides a large product among all
cores, whatever device it belongs to, and PyTorch's threads do the same. What
one core does is measured by `--cores=1`, in a run of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

import fedjax_sim
from benchmarks import cases, machine, pytorch, show
from benchmarks.bare import Bare, rows_of
from benchmarks.cases import Case
from benchmarks.rounds import ENGINES, Engine
from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json
from fedjax_sim.data import FederatedDataset
from fedjax_sim.distributed import cpu
from fedjax_sim.engine.plan import CohortPlan, at_round
from fedjax_sim.simulation.simulator import Simulator

MODES = {"1": ("one",), "all": ("all",), "both": ("one", "all")}

# Name -> (of whose seconds, by whose): how many times as fast the second is.
RATIOS = {
  "one_to_bare": ("bare", "one"),
  "all_to_bare": ("bare", "all"),
  "all_to_one": ("one", "all"),
  "one_to_torch": ("torch", "one"),
  "all_to_torch": ("torch", "all"),
}


def ratios_of(engines: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Return the ratios of some engines, as `RATIOS` has them.

  Args:
    engines: names as in `ENGINES`, or with lanes.
  """
  if set(engines) <= set(ENGINES):
    return dict(RATIOS)
  return {
    f"{name}_to_{other}": (other, name)
    for other in ("bare", "torch")
    for name in engines
  }


def are_lanes(text: str) -> bool:
  """Return whether a flag's text is a number of lanes, or "auto"."""
  return text == "auto" or (text.isdecimal() and int(text) > 0)


def named(name: str) -> tuple[int | None, int | Literal["auto"] | None]:
  """Return the devices and the lanes that an engine's name tells.

  None as `benchmarks.cases.simulator` takes it.
  """
  devices, _, lanes = name.partition("_")
  if lanes in ("", "auto"):
    return ENGINES[devices], "auto" if lanes else None
  return ENGINES[devices], int(lanes)


def plans_of(simulator: Simulator, first: int, count: int) -> list[CohortPlan]:
  """Return the plans of the `count` rounds that follow `first` rounds."""
  plans: list[CohortPlan] = []
  while len(plans) < count:
    planned = simulator.plan(first + len(plans), count - len(plans), 1)
    plans += [at_round(planned.cohorts, r) for r in range(planned.num_rounds)]
  return plans


def measure(
  case: Case,
  engines: Sequence[str],
  pairs: int,
  torch: Any,
  data: FederatedDataset | None = None,
  most_seconds: float = math.inf,
) -> dict[str, Any]:
  """Measure a case; return all that is reported of it.

  Args:
    case: what is trained.
    engines: keys of `ENGINES`, or those with lanes.
    pairs: turns that count.
    torch: the module; None: without it.
    data: its clients; None: random ones.
    most_seconds: that all may take. Two thirds gone, no further engine is
      compiled; all gone, no further turn begins. One turn of one engine always
      counts.
  """
  began = time.perf_counter()
  spent = lambda: time.perf_counter() - began
  machine.forget_peak()
  if data is None:
    data = cases.dataset(case)
  task = case.model(case.example_shape, case.num_classes)
  running: dict[str, Engine] = {}
  for name in engines:
    if running and spent() > most_seconds * 2 / 3:
      break
    devices, lanes = named(name)
    simulator = cases.simulator(case, task, data, devices=devices, lanes=lanes)
    running[name] = Engine(simulator, case.rounds, case.dispatches)
    running[name].compile()
  simulator = next(iter(running.values())).simulator
  (batching,) = simulator.batchings
  rounds = case.rounds * case.dispatches
  largest = np.sort(batching.order_length(data.train.sizes))
  bare = Bare(
    task,
    data.train.examples,
    batch_size=batching.batch_size,
    learning_rate=case.learning_rate,
    capacity=rounds * int(largest[-case.clients_per_round :].sum()),
    prepare=data.prepare,
  )
  loop = torch and pytorch.Loop(
    torch,
    case.pytorch,
    case.example_shape,
    case.num_classes,
    case.learning_rate,
  )
  turns: list[dict[str, float]] = []
  steps: list[int] = []
  for turn in range(pairs + 1):
    if turns and spent() > most_seconds:
      break
    rows = rows_of(
      plans_of(simulator, turn * rounds, rounds), batching.batch_size
    )
    count = len(rows) // batching.batch_size
    calls: dict[str, Callable[[], float]] = {
      name: engine.seconds for name, engine in running.items()
    }
    calls["bare"] = _bare_seconds(bare, rows)
    if loop is not None:
      calls["torch"] = _torch_seconds(
        loop, case, data, rows, batching.batch_size
      )
    timed = {name: calls[name]() for name in rotated(calls, turn)}
    if turn:  # the first one compiles and warms up
      turns.append(timed)
      steps.append(count)
  peak = machine.matmul_peak()
  result = _summary(case, running, bare, turns, steps, peak, loop)
  result["left_out"] = [name for name in engines if name not in running]
  result["pairs"] = len(turns)
  for engine in running.values():
    engine.close()
  return result


def _bare_seconds(bare: Bare, rows: np.ndarray) -> Callable[[], float]:
  given = bare.put(rows)

  def seconds() -> float:
    began = time.perf_counter()
    bare.train(*given)
    return time.perf_counter() - began

  return seconds


def _torch_seconds(
  loop: pytorch.Loop,
  case: Case,
  data: FederatedDataset,
  rows: np.ndarray,
  batch_size: int,
) -> Callable[[], float]:
  """Return a function that estimates the seconds of all rows from the first."""
  some = rows[: case.torch_batches * batch_size]
  batches = loop.batches(data.train.examples, some, batch_size, data.prepare)
  share = len(rows) / len(some)
  return lambda: share * loop.seconds(batches)


def _summary(
  case: Case,
  running: Mapping[str, Engine],
  bare: Bare,
  turns: list[dict[str, float]],
  steps: list[int],
  peak: float,
  loop: pytorch.Loop | None,
) -> dict[str, Any]:
  ratios = {
    name: [t[a] / t[b] for t in turns]
    for name, (a, b) in ratios_of(list(running)).items()
    if a in turns[0] and b in turns[0]
  }
  any_engine = next(iter(running.values()))
  medians = {name: statistics.median(values) for name, values in ratios.items()}
  return {
    "parameters": any_engine.simulator.states.num_parameters,
    "num_clients": any_engine.simulator.data.train.num_clients,
    "clients_per_round": case.clients_per_round,
    "batch_size": bare.batch_size,
    "rounds_per_dispatch": case.rounds,
    "rounds_per_turn": case.rounds * case.dispatches,
    "steps_per_turn": statistics.mean(steps),
    "flops_per_step": bare.flops,
    "matmul_peak": peak,
    "process_peak_bytes": machine.process_peak_bytes(),
    "engines": {
      name: {
        "rounds_per_second": statistics.median(
          case.rounds * case.dispatches / turn[name] for turn in turns
        ),
        **_engine_summary(name, engine, bare.flops, turns, steps, peak),
      }
      for name, engine in running.items()
    },
    "ratios": {
      name: medians.get(name, math.nan) for name in ratios_of(list(running))
    },
    "ratios_of_turns": ratios,
    "torch": loop and _torch_summary(case, loop, steps),
    "short": [
      name
      for name, aim in case.aims.items()
      if medians.get(name, math.inf) < aim
    ],
    "aims": dict(case.aims),
  }


def _torch_summary(
  case: Case, loop: pytorch.Loop, steps: list[int]
) -> dict[str, Any]:
  timed = [min(case.torch_batches, count) for count in steps]
  return {
    "threads": loop.threads,
    "seconds_by_threads": {str(n): s for n, s in loop.tried.items()},
    "timed_batches": statistics.mean(timed),
    "batches": statistics.mean(steps),
    "extrapolated": timed != steps,
  }


def _engine_summary(
  name: str,
  engine: Engine,
  flops: float,
  turns: list[dict[str, float]],
  steps: list[int],
  peak: float,
) -> dict[str, Any]:
  simulator, waste = engine.simulator, engine.waste
  rate = lambda amount: statistics.median(
    amount * count / t[name] for t, count in zip(turns, steps, strict=True)
  )
  per_step = 1 / steps[-1]  # waste and clients are of the last turn
  achieved = rate(flops)
  peaks = 1 if jax.default_backend() == "cpu" else simulator.mesh.size
  program = engine.program
  return {
    "devices": simulator.mesh.size,
    "lanes": simulator.choose_lanes().lanes,
    "examples_per_second": rate(waste.useful * per_step),
    "clients_per_second": rate(engine.clients * per_step),
    "step_waste": waste.step / waste.computed,
    "last_batch_waste": waste.batch / waste.computed,
    "device_imbalance": waste.idle / (waste.idle + waste.computed),
    "compilations": simulator.compilations,
    "program_bytes": program.device_bytes,
    "flops_per_second": achieved,
    "share_of_peak": achieved / (peak * peaks),
  }


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure, print a table, and write JSON if asked to."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.engine", description="How fast the engine is."
  )
  parser.add_argument(
    "--cases",
    default=",".join(cases.CASES),
    help="comma-separated, of: %(default)s",
  )
  parser.add_argument("--pairs", type=int, default=7, help="turns to measure")
  parser.add_argument("--devices", choices=MODES, default="both")
  parser.add_argument(
    "--cores", type=int, help="of the CPU, on Linux; by default all"
  )
  parser.add_argument(
    "--lanes",
    help="comma-separated numbers, or auto: an engine of each, instead of the"
    " lanes that a run has",
  )
  parser.add_argument(
    "--clients-per-round",
    type=int,
    help="of every case, in so many fewer rounds a turn",
  )
  parser.add_argument(
    "--seconds",
    type=float,
    default=math.inf,
    help="that a case may take; then lanes and turns are left out",
  )
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  parser.add_argument("--json", help="file to write")
  flags = parser.parse_args(arguments)
  if flags.pairs < 1:
    parser.error("--pairs: give at least 1")
  names = flags.cases.split(",")
  for name in names:
    if name not in cases.CASES:
      parser.error(f"--cases: {name!r} is none of {', '.join(cases.CASES)}")

  lanes = flags.lanes.split(",") if flags.lanes else []
  for number in lanes:
    if not are_lanes(number):
      parser.error(f"--lanes: {number!r} is neither 'auto' nor a number > 0")
  if not flags.seconds > 0:
    parser.error("--seconds: give more than 0")

  if flags.cores is not None:
    if not hasattr(os, "sched_setaffinity"):
      parser.error("--cores: this system cannot keep a process to some cores")
    if not 1 <= flags.cores <= cpu.count():
      parser.error(f"--cores: give 1 to {cpu.count()}")
    machine.pin(flags.cores)
  fedjax_sim.setup()
  engines = MODES[flags.devices]
  if jax.device_count() == 1:
    engines = ("one",)  # all are one
  if lanes:
    engines = tuple(f"{name}_{n}" for name in engines for n in lanes)
  torch = pytorch.load()
  report: dict[str, Any] = {
    "machine": machine.describe(),
    "pairs": flags.pairs,
    "notes": [] if torch else [pytorch.MISSING],
    "cases": {},
  }
  for name in names:
    case = cases.CASES[name]
    if flags.clients_per_round is not None:
      case = cases.with_cohort(case, flags.clients_per_round)
    if flags.scale == "smoke":
      case = cases.smoke(case)
    began = time.perf_counter()
    pairs = min(flags.pairs, case.most_pairs)
    report["cases"][name] = measure(
      case, engines, pairs, torch, most_seconds=flags.seconds
    )
    show.progress(f"{name}: {time.perf_counter() - began:.0f} s")
    if flags.json:  # what is there if a later case fails
      write_json(flags.json, report)
  show.engine(report)


if __name__ == "__main__":
  main()
