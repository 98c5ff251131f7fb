r"""Do corrections of client drift help where clients differ?

    python -m benchmarks.heterogeneous
    python -m benchmarks.heterogeneous --data=synthetic --clients_per_round=10 \
      --rates=0.001,0.003,0.01,0.03,0.1

Accuracy after the last round, over the seeds, as mean and standard error; the
seed draws data, partition, parameters and cohorts. Each algorithm has the
client learning rate of `--rates` that gives it the best mean.

- `digits`: 100 clients of equal sizes with few classes each, by a Dirichlet
  distribution with alpha 0.1; an MLP with 64 hidden units; the central test
  set.
- `synthetic`: synthetic(1, 1) over 30 clients, whose sizes and numbers of local
  steps differ widely; logistic regression; examples held out inside clients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import seeds
from fedjax_sim import Runtime, Simulator, optimizer, sampling
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fednova import fednova
from fedjax_sim.algorithms.mime_lite import mime_lite
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.core import Algorithm, Task
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
BETA = flags.DEFINE_float("beta", 0.9, "momentum of MimeLite")

Make = Callable[..., Algorithm]
ALGORITHMS: dict[str, tuple[Make, dict[str, Any]]] = {
  "FedAvg": (fedavg, {}),
  "FedAvg, equal weights": (fedavg, {"weighting": "uniform"}),
  "SCAFFOLD, option I": (scaffold, {"option": "I"}),
  "SCAFFOLD, option II": (scaffold, {"option": "II"}),
  "FedNova": (fednova, {}),
  "MimeLite": (mime_lite, {}),
}


def problem(seed: int) -> tuple[FederatedDataset, Task, str]:
  """Return the data, the task and the metric."""
  if DATA.value == "digits":
    data = load_digits(alpha=0.1, seed=seed)
    task = mlp(data.example_shape, data.num_classes, (64,))
    return data, task, "test/accuracy"
  data = load_synthetic(alpha=1.0, beta=1.0, seed=seed)
  task = logistic_regression(data.example_shape, data.num_classes)
  return data, task, "seen/accuracy"


def accuracy(
  make: Make, options: dict[str, Any], rate: float, seed: int
) -> float:
  """Return the last model's accuracy."""
  data, task, metric = problem(seed)
  local = optimizer("sgd", learning_rate=rate)
  if make is mime_lite:  # (1 - beta) rate is eta's factor of a new gradient
    local = optimizer(
      "sgd", learning_rate=(1 - BETA.value) * rate, momentum=BETA.value
    )
  simulator = Simulator(
    task=task,
    algorithm=make(task, local, optimizer("sgd", learning_rate=1.0), **options),
    data=data,
    sampler=sampling.uniform(data.train.num_clients, COHORT.value),
    batching=LocalBatching(batch_size=8, epochs=EPOCHS.value),
    seed=seed,
    runtime=Runtime(lanes=1),
  )
  return seeds.trained(simulator, ROUNDS.value)[metric]


def main(argv: list[str]) -> None:
  """Run all, and print the table."""
  del argv
  one_device_a_core()
  rates = [float(rate) for rate in RATES.value]
  found = seeds.compare(
    {
      f"{name}, rate {rate:g}": functools.partial(accuracy, *case, rate)
      for name, case in ALGORITHMS.items()
      for rate in rates
    },
    SEEDS.value,
  )
  rows = {}
  for name in ALGORITHMS:
    named = {rate: found[f"{name}, rate {rate:g}"] for rate in rates}
    best = max(rates, key=lambda rate: np.mean(named[rate]))
    rows[f"{name}, rate {best:g}"] = seeds.told(named[best])
  print_final_table({}, rows)


if __name__ == "__main__":
  app.run(main)
