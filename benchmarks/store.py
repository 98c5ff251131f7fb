"""What do a million clients on the disk cost?

    python -m benchmarks.store --folder=DIR

Writes stores of 100,000 and 1,000,000 clients, of 1 to 39 examples of 64 bytes,
opens them, and trains a logistic regression in rounds of 10,000 clients, read
from the disk. Every part runs in a process of its own, whose peak of resident
memory is printed. The two stores take turns, a few rounds each; ratios of times
are quartiles over the turns. Then a CNN, in cohorts of 10 of 500 clients with
images of 28 x 28, takes turns between the residencies.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.apart import apart, build

RESIDENCIES = ["device", "host", "disk"]


def open_it(path: Path) -> dict[str, float]:
  """Open a store five times; return the least seconds."""
  from fedjax_sim.data import open_store

  seconds = []
  for _ in range(5):
    began = time.perf_counter()
    open_store(path)
    seconds.append(time.perf_counter() - began)
  return {"seconds": min(seconds)}


def check(path: Path) -> dict[str, float]:
  """Read all of a store and compare its checksums; return the seconds."""
  from fedjax_sim.data import verify

  began = time.perf_counter()
  verify(path)
  return {"seconds": time.perf_counter() - began}


def simulator_of(
  path: Path, cohort: int, residency: Any, cnn: bool = False
) -> Any:
  """Return a simulator of a linear model or a CNN on a store's clients."""
  from fedjax_sim import LocalBatching, Runtime, Simulator, optimizer, sampling
  from fedjax_sim.algorithms.fedavg import fedavg
  from fedjax_sim.data import open_store
  from fedjax_sim.models.femnist_cnn import femnist_cnn
  from fedjax_sim.models.logistic_regression import logistic_regression

  data = open_store(path)
  model = femnist_cnn if cnn else logistic_regression
  task = model(data.example_shape, data.num_classes)
  sgd = optimizer("sgd", learning_rate=0.1), optimizer("sgd", learning_rate=1.0)
  return Simulator(
    task=task,
    algorithm=fedavg(task, *sgd),
    data=data,
    sampler=sampling.uniform(data.train.num_clients, cohort),
    batching=LocalBatching(batch_size=20),
    runtime=Runtime(lanes=1, rounds_per_dispatch=1, residency=residency),
  )


def train(
  paths: list[Path],
  cohort: int,
  rounds: int,
  residencies: list[str],
  cnn: bool = False,
) -> dict[str, Any]:
  """Train on every store with every residency, a few rounds each in turns."""
  from fedjax_sim import setup

  setup()
  simulators = [
    simulator_of(path, cohort, residency, cnn)
    for path in paths
    for residency in residencies
  ]
  states = [s.init() for s in simulators]
  seconds: list[list[float]] = [[] for _ in simulators]
  resident, losses = [], []
  turn = max(1, rounds // 10)
  for done in range(0, rounds, turn):
    for i, simulator in enumerate(simulators):
      began = time.perf_counter()
      for out in simulator.run(states[i], min(done + turn, rounds)):
        states[i] = out.state
        resident.append(_resident())
        losses.append(float(out.rows[0]["train/loss"]))
      seconds[i].append((time.perf_counter() - began) / turn)
  return {
    "seconds": [times[1:] for times in seconds],  # the first one compiles
    "resident": resident,
    "losses": [losses[0], losses[-1]],
    "digests": [
      _digest(s, state) for s, state in zip(simulators, states, strict=True)
    ],
  }


def _digest(simulator: Any, state: Any) -> str:
  from fedjax_sim.core.digests import tree_digest

  return tree_digest(simulator.algorithm.variables(state.server).params)


def _resident() -> int:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize()


FOLDER = flags.DEFINE_string("folder", None, "Where stores are written.")
CLIENTS = flags.DEFINE_integer("clients", 1_000_000, "Of the larger store.")
COHORT = flags.DEFINE_integer("clients_per_round", 10_000, "Of a round.")
ROUNDS = flags.DEFINE_integer("rounds", 100, "On each store.")
IMAGES = flags.DEFINE_integer("image_clients", 500, "Of the CNN.")
KEEP = flags.DEFINE_boolean("keep", False, "Leave the stores there.")


def main(argv: list[str]) -> None:
  """Print the name of every measurement and its values as JSON."""
  del argv
  folder = Path(FOLDER.value or ".") / "benchmark_stores"
  sizes = {"smaller": CLIENTS.value // 10, "larger": CLIENTS.value}
  report: dict[str, Any] = {"clients": sizes}
  try:
    for name, clients in sizes.items():
      path = folder / name
      report[f"build {name}"] = apart(build, path, clients)
      report[f"open {name}"] = apart(open_it, path)
      report[f"verify {name}"] = apart(check, path)
      files = (file.stat().st_size for file in path.rglob("*.npy"))
      report[f"bytes {name}"] = sum(files)
    both = [folder / name for name in sizes]
    alone = apart(train, both[1:], COHORT.value, ROUNDS.value, ["disk"])
    turns = apart(train, both, COHORT.value, ROUNDS.value, ["disk"])
    apart(build, folder / "images", IMAGES.value, (28, 28, 1))
    cnn = apart(
      *(train, [folder / "images"], 10, ROUNDS.value, RESIDENCIES, True)
    )
  finally:
    if not KEEP.value:
      shutil.rmtree(folder, ignore_errors=True)
  small, large = map(np.asarray, turns["seconds"])
  report["disk"] = {
    "peak": alone["peak"],
    "resident": _quartered(alone["resident"]),
    "losses": alone["losses"],
    "larger over smaller": np.percentile(large / small, [25, 50, 75]).tolist(),
  }
  device, *others = map(np.asarray, cnn["seconds"])
  report["CNN, speed over device's"] = {
    name: np.percentile(device / times, [25, 50, 75]).tolist()
    for name, times in zip(RESIDENCIES[1:], others, strict=True)
  }
  report["CNN, different parameters"] = len(set(cnn["digests"])) - 1
  for name, values in report.items():
    print(name, json.dumps(values))


def _quartered(values: list[int]) -> list[int]:
  """Return the values after the first round, each quarter, and the last."""
  where = np.linspace(0, len(values) - 1, 5).astype(int)
  return [values[i] for i in where]


if __name__ == "__main__":
  flags.mark_flag_as_required("folder")
  app.run(main)
