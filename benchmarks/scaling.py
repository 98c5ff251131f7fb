"""How time and memory grow with the cohort, and what a start costs.

python -m benchmarks.scaling --json=scaling.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import fedjax_sim
from benchmarks import cases, machine, show
from benchmarks.rounds import Engine
from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.plan import PaddingWaste
from fedjax_sim.simulation.runtime import MOST_ROUNDS

SIZES = (100, 316, 1000, 3162, 10_000)
TURN = 10_000  # clients that are timed at once, about
_ROOT = Path(__file__).resolve().parents[1]


def cohort_sizes(sizes: Sequence[int], turns: int) -> list[dict[str, Any]]:
  """Measure time and memory a client, for every cohort size, LR on all devices.

  Rounds of small cohorts are run together, as a run does by itself: as many a
  call as have about as many clients as the largest cohort, 64 at most. Beside
  it stands the time with one round a call. The sizes take turns, each turn in
  another order, and a size's time is its median; the population is the same
  for all. The memory is that of a program of one round and one lane, without
  the examples.

  Args:
    sizes: clients a round, increasing.
    turns: that count.
  """
  population = replace(cases.CASES["lr_large"], num_clients=max(sizes) * 6 // 5)
  data = cases.dataset(population)
  task = population.model(population.example_shape, population.num_classes)
  together = {s: max(1, min(MOST_ROUNDS, max(sizes) // s)) for s in sizes}
  engines: dict[tuple[int, int], Engine] = {}
  for size in sizes:
    for rounds in {1, together[size]}:
      case = replace(population, clients_per_round=size, rounds=rounds)
      simulator = cases.simulator(case, task, data, devices=None)
      calls = max(1, round(TURN / (size * rounds)))
      engines[size, rounds] = Engine(simulator, rounds, calls)
  times: dict[tuple[int, int], list[float]] = {key: [] for key in engines}
  for turn in range(turns + 1):
    for key in rotated(list(engines), turn):
      engine = engines[key]
      seconds = engine.seconds()
      if turn:  # the first one compiles and warms up
        times[key].append(seconds / engine.clients)

  def ratio(key: tuple[int, int], to: tuple[int, int]) -> float:
    pairs = zip(times[key], times[to], strict=True)
    return statistics.median(a / b for a, b in pairs)

  stored = sum(x.nbytes for x in data.train.examples.values())
  rows = []
  first = sizes[0]
  for size in sizes:
    case = replace(population, clients_per_round=size, rounds=1)
    single = cases.simulator(case, task, data, devices=None, lanes=1)
    program = single.compiler.program(1, size)
    rows.append(
      {
        "clients_per_round": size,
        "rounds_per_call": together[size],
        "seconds_per_client": statistics.median(times[size, together[size]]),
        "time_ratio": ratio((size, together[size]), (first, together[first])),
        "one_round_time_ratio": ratio((size, 1), (first, 1)),
        "program_bytes": program.device_bytes - stored,
        "program_bytes_per_client": (program.device_bytes - stored) / size,
        "compilations": max(
          e.simulator.compilations for (s, _), e in engines.items() if s == size
        ),
      }
    )
  for engine in engines.values():
    engine.close()
  for row in rows:
    row["memory_ratio"] = row["program_bytes"] / rows[0]["program_bytes"]
  return rows


def step_waste(
  num_clients: int = 10_000, cohort: int = 1000, lanes: int = 10
) -> float:
  """Return the share of lane steps that wait, for lognormal sizes with sigma 1.

  Args:
    num_clients: the population.
    cohort: clients a round.
    lanes: clients that a device trains at once.
  """
  case = replace(cases.CASES["lr"], num_clients=num_clients)
  sizes = cases.sizes(case)
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  batching = LocalBatching(batch_size=case.batch_size)
  shape = plans.capacity([sizes], [batching], cohort, lanes=lanes, devices=1)
  total = PaddingWaste()
  for round_ in range(5):
    rng = np.random.default_rng(round_)
    ids = rng.choice(num_clients, cohort, replace=False)
    plan = plans.plan([offsets], [batching], ids, shape, seed=0, round_=round_)
    total += plans.waste(plan, [batching])
  return total.step / total.computed


def start(scale: str, times: int) -> dict[str, float]:
  """Measure the seconds to a new process's first round: each part's median.

  Args:
    scale: full or smoke.
    times: processes, one after the other.
  """
  environment = {  # nothing is compiled beforehand
    k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"
  }
  found = []
  for _ in range(times):
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.first_round", str(time.time()), scale],
      capture_output=True,
      text=True,
      check=False,
      cwd=_ROOT,
      env=environment,
    )
    if done.returncode:
      raise RuntimeError(f"benchmarks.first_round failed:\n{done.stderr}")
    found.append(json.loads(done.stdout.splitlines()[-1]))
  return {
    part: statistics.median(parts[part] for parts in found) for part in found[0]
  }


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure, print tables, and write JSON if asked to."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.scaling",
    description="How time and memory grow with the cohort.",
  )
  parser.add_argument("--turns", type=int, default=7, help="that count")
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  parser.add_argument("--json", help="file to write")
  flags = parser.parse_args(arguments)
  if flags.turns < 1:
    parser.error("--turns: give at least 1")
  small = flags.scale == "smoke"
  # First, while this process needs no core; a GPU takes one process at a time.
  started = start(flags.scale, 1 if small else 3)
  fedjax_sim.setup()
  sizes = (10, 40) if small else SIZES
  report = {
    "machine": machine.describe(),
    "cohorts": cohort_sizes(sizes, flags.turns),
    "step_waste": step_waste(),
    "start": started,
  }
  show.scaling(report)
  if flags.json:
    write_json(flags.json, report)


if __name__ == "__main__":
  main()
