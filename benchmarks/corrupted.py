"""Which weights protect a model from clients with random labels?

    python -m benchmarks.corrupted

MNIST by writer: of the writers that train, 30 % get random labels, and the
images of 20 others belong to the server. Accuracy on the writers that never
train, over the seeds, as mean and standard error. The seed draws everything:
who is corrupted, who is the server's, the parameters and the cohorts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from absl import app, flags

from benchmarks import seeds
from fedjax_sim import Runtime, Simulator, aggregators, optimizer, sampling
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.dga_rl import dga_rl
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlaw import fedlaw
from fedjax_sim.core import Algorithm
from fedjax_sim.data import (
  FederatedDataset,
  load_mnist_writers,
  with_random_labels,
  with_server_data,
)
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.mlp import mlp
from fedjax_sim.reporting import print_final_table

SEEDS = flags.DEFINE_integer("seeds", 5, "how many seeds")
ROUNDS = flags.DEFINE_integer("rounds", 100, "of every run")
COHORT = flags.DEFINE_integer("clients_per_round", 20, "of every run")
CORRUPTED = flags.DEFINE_float("corrupted", 0.3, "of the clients")
SERVER = flags.DEFINE_integer("server_clients", 20, "clients of the server's")
RATE = flags.DEFINE_float("learning_rate", 0.1, "of the clients")
EPOCHS = flags.DEFINE_integer("epochs", 5, "of a client in a round")
PULL = flags.DEFINE_float("pull", 0.2, "kl_weight of FedLAW")
BETA = flags.DEFINE_float("beta", 4.0, "of the softmax weights")

Make = Callable[..., Algorithm]


def algorithms() -> dict[str, tuple[Make, dict[str, Any]]]:
  """Return the algorithms that are compared: name -> (algorithm, options)."""
  return {
    "FedAvg": (fedavg, {}),
    "DGA, loss": (dga, {"beta": BETA.value}),
    "DGA, loss, RL": (dga_rl, {"beta": BETA.value}),
    "FedAvg, RL": (dga_rl, {"beta": 0.0}),
    "FedLAW": (fedlaw, {"kl_weight": PULL.value}),
  }


def data_of(seed: int, corrupted: float) -> FederatedDataset:
  """Return the writers' data; the server's images keep their labels."""
  data = with_server_data(load_mnist_writers(), SERVER.value, seed)
  return with_random_labels(data, corrupted, seed)[0]


def accuracy(
  corrupted: float, make: Make, options: dict[str, Any], seed: int
) -> float:
  """Return the last model's accuracy on the writers that never train."""
  data = data_of(seed, corrupted)
  task = mlp(data.example_shape, data.num_classes, (100,))
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
    batching=LocalBatching(batch_size=20, epochs=EPOCHS.value),
    aggregator=(
      aggregators.stack()
      if algorithm.requirements.all_updates
      else aggregators.weighted_mean()
    ),
    seed=seed,
    runtime=Runtime(lanes=1),
  )
  return seeds.trained(simulator, ROUNDS.value)["unseen/accuracy"]


def main(argv: list[str]) -> None:
  """Run all, and print the table."""
  del argv
  one_device_a_core()
  cases = {
    "FedAvg, no client corrupted": (0.0, *algorithms()["FedAvg"]),
    **{k: (CORRUPTED.value, *v) for k, v in algorithms().items()},
  }
  rows = seeds.compare(
    {name: functools.partial(accuracy, *case) for name, case in cases.items()},
    SEEDS.value,
  )
  print_final_table({}, {name: seeds.told(row) for name, row in rows.items()})


if __name__ == "__main__":
  app.run(main)
