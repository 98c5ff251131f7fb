r"""Do corrections of client drift help where clients differ?

    python -m benchmarks.heterogeneous
    python -m benchmarks.heterogeneous --data=synthetic --clients_per_round=10 \
      --rates=0.001,0.003,0.01,0.03,0.1
    python -m benchmarks.heterogeneous --algorithms=fedavg,feddyn,moon \
      --options=alpha=0.1,mu=5

Accuracy after the last round, over the seeds, as mean and standard error; the
seed draws data, partition, parameters and cohorts. Each algorithm has the
client learning rate of `--rates` that gives it the best mean.

- `digits`: 100 clients of equal sizes with few classes each, by a Dirichlet
  distribution with alpha 0.1; an MLP with 64 hidden units; the central test
  set.
- `synthetic`: synthetic(1, 1) over 30 clients, whose sizes and numbers of local
  steps differ widely; logistic regression, which has no representations for
  MOON; examples held out inside clients.

Clients of FedShuffle divide their rate by their local steps; the table has the
rate of a client with the mean number of them. Numbers of algorithms are their
papers' defaults, but for `--options`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import seeds
from fedjax_sim import Runtime, Simulator, optimizer, sampling
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.algorithms import ALGORITHMS as REGISTRY
from fedjax_sim.core import Algorithm, Task, validate
from fedjax_sim.data import FederatedDataset, load_digits, load_synthetic
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from fedjax_sim.reporting import print_final_table

DATA = flags.DEFINE_enum("data", "digits", ["digits", "synthetic"], "data set")
SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds")
ROUNDS = flags.DEFINE_integer("rounds", 50, "of every run")
COHORT = flags.DEFINE_integer("clients_per_round", 20, "of every run")
RATES = flags.DEFINE_list("rates", ["0.03", "0.1", "0.3"], "of the clients")
EPOCHS = flags.DEFINE_integer("epochs", 5, "of a client in a round")
BETA = flags.DEFINE_float("beta", 0.9, "momentum of Mime and MimeLite")

# What a run is called -> title, name in the registry, options.
ALGORITHMS: dict[str, tuple[str, str, dict[str, Any]]] = {
  "fedavg": ("FedAvg", "fedavg", {}),
  "fedavg_equal": (
    "FedAvg, equal weights",
    *("fedavg", {"weighting": "uniform"}),
  ),
  "scaffold_1": ("SCAFFOLD, option I", "scaffold", {"option": "I"}),
  "scaffold": ("SCAFFOLD, option II", "scaffold", {"option": "II"}),
  "fednova": ("FedNova", "fednova", {}),
  "mime_lite": ("MimeLite", "mime_lite", {}),
  "agnostic": ("Agnostic", "agnostic", {}),
  "fedadagrad": ("FedAdagrad", "fedadagrad", {}),
  "fedadam": ("FedAdam", "fedadam", {}),
  "fedavgm": ("FedAvgM", "fedavgm", {}),
  "feddyn": ("FedDyn", "feddyn", {}),
  "fedexp": ("FedExP", "fedexp", {}),
  "fedlin": ("FedLin", "fedlin", {}),
  "fedprox": ("FedProx", "fedprox", {}),
  "fedshuffle": ("FedShuffle", "fedshuffle", {}),
  "fedyogi": ("FedYogi", "fedyogi", {}),
  "mime": ("Mime", "mime", {}),
  "moon": ("MOON", "moon", {}),
  "q_fedavg": ("q-FedAvg", "q_fedavg", {}),
}
BATCH = 8
CHOSEN = flags.DEFINE_list(
  "algorithms", [*ALGORITHMS][:6], f"some of {', '.join(ALGORITHMS)}"
)
OPTIONS = flags.DEFINE_list(
  "options", [], "numbers, such as alpha=0.1, for all algorithms that take them"
)


def problem(seed: int) -> tuple[FederatedDataset, Task, str]:
  """Return the data, the task and the metric."""
  if DATA.value == "digits":
    data = load_digits(alpha=0.1, seed=seed)
    task = mlp(data.example_shape, data.num_classes, (64,))
    return data, task, "test/accuracy"
  data = load_synthetic(alpha=1.0, beta=1.0, seed=seed)
  task = logistic_regression(data.example_shape, data.num_classes)
  return data, task, "seen/accuracy"


def build(
  name: str, data: FederatedDataset, task: Task, rate: float
) -> Algorithm:
  """Return an algorithm of `ALGORITHMS` with a client's learning rate."""
  _, registered, options = ALGORITHMS[name]
  sizes = data.train.sizes
  local = {"learning_rate": rate}
  if name in (
    "mime",
    "mime_lite",
  ):  # (1 - beta) rate is eta's factor of a new gradient
    local = {"learning_rate": (1 - BETA.value) * rate, "momentum": BETA.value}
  if name == "fedshuffle":
    steps = EPOCHS.value * np.ceil(sizes / BATCH)
    local = {"learning_rate": rate * float(steps.mean())}
  given = {
    "client_optimizer": optimizer("sgd", **local),
    "server_optimizer": optimizer("sgd", learning_rate=1.0),
    "num_clients": data.train.num_clients,
    "mean_examples": float(sizes.mean()),
    **{k: float(v) for k, v in (x.split("=") for x in OPTIONS.value)},
    **options,
  }
  make = REGISTRY[registered]
  taken = inspect.signature(make).parameters
  return make(task, **{k: v for k, v in given.items() if k in taken})


def accuracy(name: str, rate: float, seed: int) -> float:
  """Return the last model's accuracy."""
  data, task, metric = problem(seed)
  simulator = Simulator(
    task=task,
    algorithm=build(name, data, task, rate),
    data=data,
    sampler=sampling.uniform(data.train.num_clients, COHORT.value),
    batching=LocalBatching(batch_size=BATCH, epochs=EPOCHS.value),
    seed=seed,
    runtime=Runtime(lanes=1),
  )
  return seeds.trained(simulator, ROUNDS.value)[metric]


def main(argv: list[str]) -> None:
  """Run all, and print the table."""
  del argv
  one_device_a_core()
  rates = [float(rate) for rate in RATES.value]
  titles = {
    validate.one_of("algorithms", name, ALGORITHMS): ALGORITHMS[name][0]
    for name in CHOSEN.value
  }
  found = seeds.compare(
    {
      f"{title}, rate {rate:g}": functools.partial(accuracy, name, rate)
      for name, title in titles.items()
      for rate in rates
    },
    SEEDS.value,
  )
  rows = {}
  for title in titles.values():
    named = {rate: found[f"{title}, rate {rate:g}"] for rate in rates}
    best = max(rates, key=lambda rate: np.mean(named[rate]))
    rows[f"{title}, rate {best:g}"] = seeds.told(named[best])
  print_final_table({}, rows)


if __name__ == "__main__":
  app.run(main)
