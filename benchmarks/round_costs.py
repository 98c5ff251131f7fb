r"""What a round of each algorithm costs.

    python -m benchmarks.round_costs --turns=5

Times of a dispatch over those of FedAvg, on one device, in turns, on the cases
`lr` and `cnn` of `benchmarks.engine`: median, least and greatest. Numbers of
algorithms are their papers' defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import fedjax_sim as fs
from benchmarks import cases
from benchmarks.turns import rotated
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.core import Task, validate
from fedjax_sim.tasks.mixture import with_mixture
from fedjax_sim.training.optimizers import optimizer

# The options of each, beside its papers' defaults.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
  **{
    name: {}
    for name in (
      *("agnostic", "apfl", "dga", "ditto", "fedadagrad", "fedadam"),
      *("fedavg", "fedavgm", "fedbuff", "feddyn", "fedem", "fedexp"),
      *("fedlin", "fednova", "fedprox", "fedsgd", "fedshuffle", "fedyogi"),
      *("hierarchical", "ifca", "mime", "mime_lite", "moon", "per_fedavg"),
      *("pfedme", "q_fedavg", "reptile", "scaffold"),
    )
  },
  "fedper": {"private": ("dense2/",)},
  "fedrep": {"private": ("dense2/",), "head_epochs": 1},
  "lg_fedavg": {"private": ("conv",)},
}
_OF_LAYERS = ("fedper", "fedrep", "lg_fedavg", "moon")  # more than one
_MOMENTUM = ("mime", "mime_lite")


def main(arguments: Sequence[str] | None = None) -> None:
  """Time, and print a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  listed = lambda text: text.split(",")
  parser.add_argument("--algorithms", type=listed, default=sorted(OPTIONS))
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--cases", type=listed, default=["lr", "cnn"])
  args = parser.parse_args(arguments)
  for name in args.algorithms:
    validate.one_of("algorithms", name, OPTIONS)
  fs.setup()
  names = ["fedavg", *(name for name in args.algorithms if name != "fedavg")]
  found = {case: _ratios(case, names, args.turns) for case in args.cases}
  print("| algorithm |" + "".join(f" {case} |" for case in args.cases))
  print("| --- |" + " --- |" * len(args.cases))
  for name in names:
    cells = [_told(found[case].get(name)) for case in args.cases]
    print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))


def timed_in_turns(
  simulators: Mapping[str, fs.Simulator], turns: int
) -> dict[str, list[float]]:
  """Return the times of a dispatch over those of the first simulator's.

  Args:
    simulators: name -> simulator, the first of which all are compared with.
    turns: how often each is timed.
  """
  timers = {name: _timer(simulator) for name, simulator in simulators.items()}
  first = next(iter(timers))
  ratios: dict[str, list[float]] = {name: [] for name in timers}
  for turn in range(turns):
    seconds = {name: timers[name]() for name in rotated(timers, turn)}
    for name in timers:
      ratios[name].append(seconds[name] / seconds[first])
  return ratios


def _told(ratios: Sequence[float] | None) -> str:
  if ratios is None:
    return ""
  low, high = min(ratios), max(ratios)
  return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def _ratios(
  case: str, names: Sequence[str], turns: int
) -> Mapping[str, list[float]]:
  """Return each algorithm's times of a call over those of FedAvg's."""
  chosen = cases.CASES[case]
  data = cases.dataset(chosen)
  task = chosen.model(chosen.example_shape, chosen.num_classes)
  fitting = [
    n for n in names if not (case.startswith("lr") and n in _OF_LAYERS)
  ]
  return timed_in_turns(
    {name: _simulator(name, task, chosen, data) for name in fitting}, turns
  )


def _simulator(
  name: str, task: Task, case: cases.Case, data: Any
) -> fs.Simulator:
  """Return a case's simulator with an algorithm of the papers' numbers."""
  task = with_mixture(task, 3) if name == "fedem" else task
  base = cases.simulator(case, task, data, devices=1)
  momentum = {"momentum": 0.9} if name in _MOMENTUM else {}
  sizes = data.train.sizes
  given = {
    "client_optimizer": optimizer(
      "sgd", learning_rate=case.learning_rate, **momentum
    ),
    "server_optimizer": optimizer("sgd", learning_rate=1.0),
    "num_clients": len(sizes),
    "mean_examples": float(sizes.mean()),
    **OPTIONS[name],
  }
  make = ALGORITHMS[name]
  taken = inspect.signature(make).parameters
  algorithm = make(task, **{k: v for k, v in given.items() if k in taken})
  return dataclasses.replace(base, task=task, algorithm=algorithm)


def _timer(simulator: fs.Simulator) -> Callable[[], float]:
  """Return what runs one call of rounds, compiled and warm, and times it."""
  planned = simulator.plan(0, simulator.runtime.rounds_per_dispatch or 1)

  def call() -> float:
    state = jax.block_until_ready(simulator.init())
    began = time.perf_counter()
    jax.block_until_ready(simulator.dispatch(state, planned).state)
    return time.perf_counter() - began

  call()
  return call


if __name__ == "__main__":
  main()
