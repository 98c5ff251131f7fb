r"""All algorithms on data that differ from client to client.

    FEDJAX_SIM_DATA=DIR python -m benchmarks.algorithms accuracy --to=DIR
    python -m benchmarks.algorithms accuracy --data=synthetic --seeds=2 \
      --rounds=20 --algorithms=fedavg,scaffold,feddyn
    python -m benchmarks.algorithms speed --turns=5

`accuracy` is two studies for each data set. The first tunes: each algorithm
with each rate of `--rates`, on seeds and held-out examples of its own. The
second trains each with its best rate on `--seeds` seeds, and compares them:
table, curves, rounds and bytes to the target are the study's own, in `--to`.
What is compared is accuracy on examples held out inside clients, each client
with its own model where the algorithm gives it one.

- `ecg`: 48 patients, a 1-D CNN;
- `mnist`: MNIST over 100 clients by a Dirichlet distribution with alpha 0.3,
  logistic regression;
- `synthetic`: synthetic(1, 1) over 30 clients, logistic regression.

Numbers of algorithms are their papers' defaults, but for the client's rate; the
server's is 1, or the algorithm's own.

`speed` measures a round of each algorithm against one of FedAvg, on one device,
in turns, on the cases `lr` and `cnn` of `benchmarks.engine`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import fedjax_sim as fs
from benchmarks import cases
from benchmarks.turns import rotated
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.config import default_config
from fedjax_sim.core import Task, validate
from fedjax_sim.training.optimizers import optimizer

# Those that train a classifier from its labels alone.
COMPARED = (
  *("agnostic", "apfl", "ditto", "fedadagrad", "fedadam", "fedavg"),
  *("fedavgm", "feddyn", "fedexp", "fedlin", "fednova", "fedprox"),
  *("fedshuffle", "fedyogi", "hierarchical", "mime", "mime_lite"),
  *("per_fedavg", "q_fedavg", "reptile", "scaffold"),
)
MOMENTUM = {"mime": 0.9, "mime_lite": 0.9}  # of the base optimizer
METRIC = "seen/accuracy"
TUNING_SEED = 1000


def _ecg() -> ConfigDict:
  config = default_config()
  config.data.name = "ecg"
  config.model.name = "ecg_cnn"
  config.client.batch_size = 20
  config.client.epochs = 3
  return config


def _mnist() -> ConfigDict:
  config = default_config()
  config.data.name = "mnist"
  config.data.num_clients = 100
  config.data.partition = "dirichlet"
  config.data.alpha = 0.3
  config.model.name = "logistic_regression"
  config.client.batch_size = 20
  config.client.epochs = 1
  return config


def _synthetic() -> ConfigDict:
  config = default_config()
  config.data.name = "synthetic"
  config.data.num_clients = 30
  config.data.alpha = 1.0
  config.data.beta = 1.0
  config.model.name = "logistic_regression"
  config.client.batch_size = 10
  config.client.epochs = 5
  return config


DATA: dict[str, Callable[[], ConfigDict]] = {
  "ecg": _ecg,
  "mnist": _mnist,
  "synthetic": _synthetic,
}


def main(arguments: Sequence[str] | None = None) -> None:
  """Run what the first argument says."""
  args = _parsed(arguments)
  fs.setup()
  if args.what == "speed":
    _speed(args)
    return
  for data in args.data:
    validate.one_of("data", data, DATA)
  with tempfile.TemporaryDirectory() as scratch:
    for data in args.data:
      _accuracy(args, data, Path(args.to or scratch) / data)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  listed = lambda text: text.split(",")
  parser.add_argument("what", choices=("accuracy", "speed"))
  parser.add_argument("--data", type=listed, default=[*DATA])
  parser.add_argument("--algorithms", type=listed, default=[*COMPARED])
  parser.add_argument("--rates", type=listed, default=["0.01", "0.03", "0.1"])
  parser.add_argument("--rounds", type=int, default=100)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--tuning_seeds", type=int, default=2)
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--cases", type=listed, default=["lr", "cnn"])
  parser.add_argument("--to", help="folder to keep the studies in")
  args = parser.parse_args(arguments)
  for name in args.algorithms:
    validate.one_of("algorithms", name, COMPARED)
  return args


def _accuracy(args: argparse.Namespace, data: str, folder: Path) -> None:
  """Tune and compare on one data set, and print the table."""
  config = DATA[data]()
  config.data.heldout_fraction = 0.2
  config.server.rounds = args.rounds
  config.server.clients_per_round = 10
  config.server.eval_every = max(1, args.rounds // 20)
  config.runtime.lanes = 1

  def point(name: str, rate: float) -> dict[str, Any]:
    return {
      "algorithm.name": name,
      "client.learning_rate": rate,
      "client.momentum": MOMENTUM.get(name),
    }

  tuning = config.copy_and_resolve_references()
  tuning.data.seed = 1  # which examples are held out
  rates = [float(rate) for rate in args.rates]
  tuned = fs.study(
    tuning,
    folder / "tuning",
    points=[point(a, r) for a in args.algorithms for r in rates],
    seeds=range(TUNING_SEED, TUNING_SEED + args.tuning_seeds),
    metric=METRIC,
  )
  best: dict[str, float] = {}
  for row in tuned.settings():  # the best comes first
    best.setdefault(row["algorithm.name"], float(row["client.learning_rate"]))
  found = fs.study(
    config,
    folder / "compared",
    points=[point(name, best[name]) for name in args.algorithms],
    seeds=args.seeds,
    metric=METRIC,
  )
  print(f"\n{data}, {args.rounds} rounds, {args.seeds} seeds:\n")
  print("| algorithm | rate | accuracy |\n| --- | --- | --- |")
  for row in found.settings():
    error = row["std"] / max(1, row["finished"]) ** 0.5
    print(
      f"| {row['algorithm.name']} | {row['client.learning_rate']} |"
      f" {row['mean']:.4f} +- {error:.4f} |"
    )


def _speed(args: argparse.Namespace) -> None:
  """Print the time of a round of each algorithm over that of FedAvg."""
  print("| algorithm |" + "".join(f" {case} |" for case in args.cases))
  print("| --- |" + " --- |" * len(args.cases))
  names = ["fedavg", *(name for name in args.algorithms if name != "fedavg")]
  found = {case: _ratios(case, names, args.turns) for case in args.cases}
  for name in names:
    cells = [_told(found[case][name]) for case in args.cases]
    print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))


def _told(ratios: Sequence[float]) -> str:
  low, high = min(ratios), max(ratios)
  return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def _ratios(
  case: str, names: Sequence[str], turns: int
) -> Mapping[str, list[float]]:
  """Return each algorithm's times of a call over those of FedAvg's."""
  chosen = cases.CASES[case]
  data = cases.dataset(chosen)
  task = chosen.model(chosen.example_shape, chosen.num_classes)
  base = cases.simulator(chosen, task, data, devices=1)
  timers = {
    name: _timer(
      dataclasses.replace(
        base, algorithm=_made(name, task, chosen, data.train.sizes)
      )
    )
    for name in names
  }
  ratios: dict[str, list[float]] = {name: [] for name in names}
  for turn in range(turns):
    seconds = {name: timers[name]() for name in rotated(names, turn)}
    for name in names:
      ratios[name].append(seconds[name] / seconds["fedavg"])
  return ratios


def _made(name: str, task: Task, case: cases.Case, sizes: Any) -> fs.Algorithm:
  """Return an algorithm for a case, with its papers' numbers."""
  given = {
    "client_optimizer": optimizer(
      "sgd",
      learning_rate=case.learning_rate,
      **({"momentum": MOMENTUM[name]} if name in MOMENTUM else {}),
    ),
    "server_optimizer": optimizer("sgd", learning_rate=1.0),
    "num_clients": len(sizes),
    "mean_examples": float(sizes.mean()),
  }
  make = ALGORITHMS[name]
  taken = inspect.signature(make).parameters
  return make(task, **{k: v for k, v in given.items() if k in taken})


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
