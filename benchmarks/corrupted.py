"""Which weights protect a model from clients with random labels?

    python -m benchmarks.corrupted

MNIST by writer: of the writers that train, 30 % get random labels, and the
images of 20 others belong to the server. Accuracy on the writers that never
train, over the seeds, as mean and standard error. The seed draws everything:
who is corrupted, who is the server's, the parameters and the cohorts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from fedjax_sim import Runtime, Simulator, aggregators, optimizer, sampling
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.dga_rl import dga_rl
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.learned_weights import learned_weights
from fedjax_sim.base import Algorithm, Task
from fedjax_sim.data import (
  FederatedDataset,
  load_mnist_writers,
  with_random_labels,
  with_server_data,
)
from fedjax_sim.models.mlp import mlp
from fedjax_sim.reporting import print_final_table
from fedjax_sim.work import LocalWork

SEEDS = flags.DEFINE_integer("seeds", 5, "how many seeds")
ROUNDS = flags.DEFINE_integer("rounds", 100, "of every run")
COHORT = flags.DEFINE_integer("clients_per_round", 20, "of every run")
CORRUPTED = flags.DEFINE_float("corrupted", 0.3, "of the clients")
SERVER = flags.DEFINE_integer("server_clients", 20, "clients of the server's")
RATE = flags.DEFINE_float("learning_rate", 0.1, "of the clients")
EPOCHS = flags.DEFINE_integer("epochs", 5, "of a client in a round")
PULL = flags.DEFINE_float("pull", 0.2, "of the learned weights")
BETA = flags.DEFINE_float("beta", 4.0, "of the softmax weights")

Make = Callable[..., Algorithm]


def algorithms() -> dict[str, tuple[Make, dict[str, Any]]]:
  """What is compared, with its options."""
  return {
    "FedAvg": (fedavg, {}),
    "DGA, loss": (dga, {"beta": BETA.value}),
    "DGA, loss, RL": (dga_rl, {"beta": BETA.value}),
    "FedAvg, RL": (dga_rl, {"beta": 0.0}),
    "learned weights": (learned_weights, {"weight_pull": PULL.value}),
  }


def data_of(seed: int, corrupted: float) -> FederatedDataset:
  """The writers; the server's images keep their labels."""
  data = with_server_data(load_mnist_writers(), SERVER.value, seed)
  return with_random_labels(data, corrupted, seed)[0]


def accuracy(
  make: Make, options: dict[str, Any], task: Task, data: Any, seed: int
) -> float:
  """Of the last round's model on the writers that never train."""
  algorithm = make(
    task,
    optimizer("sgd", learning_rate=RATE.value),
    optimizer("sgd", learning_rate=1.0),
    **options,
  )
  simulator = Simulator(
    task=task,
    algorithm=algorithm,
    data=data,
    sampler=sampling.uniform(data.train.num_clients, COHORT.value),
    work=LocalWork(batch_size=20, epochs=EPOCHS.value),
    aggregator=(
      aggregators.stack() if algorithm.stacked else aggregators.weighted_mean()
    ),
    seed=seed,
    runtime=Runtime(lanes=1),
  )
  state = simulator.init()
  for out in simulator.run(state, ROUNDS.value):
    state = out.state
  return simulator.evaluate(state)["unseen/accuracy"]


def told(values: list[float]) -> str:
  """Mean and standard error."""
  error = np.std(values, ddof=1) / np.sqrt(len(values)) if values[1:] else 0
  return f"{np.mean(values):.4f} +- {error:.4f}"


def main(argv: list[str]) -> None:
  """Runs all, and prints the table."""
  del argv
  one_device_a_core()
  rows: dict[str, list[float]] = {}
  cases = {
    "FedAvg, no client corrupted": (0.0, algorithms()["FedAvg"]),
    **{k: (CORRUPTED.value, v) for k, v in algorithms().items()},
  }
  for seed in range(SEEDS.value):
    for name, (corrupted, (make, options)) in cases.items():
      data = data_of(seed, corrupted)
      task = mlp(data.example_shape, data.num_classes, (100,))
      found = accuracy(make, options, task, data, seed)
      rows.setdefault(name, []).append(found)
      print(f"seed {seed}, {name}: {found:.4f}", flush=True)
  print_final_table({}, {name: told(found) for name, found in rows.items()})


if __name__ == "__main__":
  app.run(main)
