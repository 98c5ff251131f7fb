"""What do unlabelled examples help where few are labelled?

    python -m benchmarks.few_labels

MNIST by writer: every writer that trains keeps the labels of 10 % of the
images. Accuracy on the writers that never train, over the seeds, as mean and
standard error. The seed draws everything: which images are labelled, the
parameters and the cohorts. Supervised training is FedLabels that never gets
beyond its burn-in, which is FedAvg on the labelled images; in one row those are
augmented as FedLabels augments the others.
"""

from __future__ import annotations

import functools
from typing import Any

from absl import app, flags

from benchmarks import seeds
from fedjax_sim import Runtime, Simulator, optimizer, sampling
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlabels import fedlabels
from fedjax_sim.core import Examples, Key, Loss, Task, Variables
from fedjax_sim.data import load_mnist_writers, with_few_labels
from fedjax_sim.data.augment import augment
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.mlp import mlp
from fedjax_sim.reporting import print_final_table

SEEDS = flags.DEFINE_integer("seeds", 5, "how many seeds")
ROUNDS = flags.DEFINE_integer("rounds", 400, "of every run")
COHORT = flags.DEFINE_integer("clients_per_round", 20, "of every run")
LABELLED = flags.DEFINE_float("labelled", 0.1, "of each client's images")
RATE = flags.DEFINE_float("learning_rate", 0.3, "of the clients")
EPOCHS = flags.DEFINE_integer("epochs", 2, "of a client in a round")
BURN_IN = flags.DEFINE_integer("burn_in", 20, "rounds of labels alone")
THRESHOLD = flags.DEFINE_float("threshold", 0.8, "of pseudo labels")
MAGNITUDE = flags.DEFINE_float("magnitude", 0.5, "of the augmentation")
L2 = flags.DEFINE_float("l2", 10.0, "of the distance to what was received")

AUGMENTED = "labelled images alone, augmented"
ALL = "FedAvg, all labels"


def cases() -> dict[str, dict[str, Any]]:
  """Return what is compared: name -> options of FedLabels."""
  own = {
    "burn_in": BURN_IN.value,
    "threshold": THRESHOLD.value,
    "magnitude": MAGNITUDE.value,
    "l2": L2.value,
  }
  return {
    "labelled images alone": own | {"burn_in": ROUNDS.value},
    AUGMENTED: own | {"burn_in": ROUNDS.value},
    "FedLabels": own,
    "FedLabels, not augmented": own | {"magnitude": 0.0},
    "FedLabels, smaller entropy": own | {"comparison": "entropy"},
    ALL: {},
  }


def augmented(task: Task) -> Task:
  """Return the task, trained on augmented images."""

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    x = augment(key, examples["x"], MAGNITUDE.value)
    return task.loss(variables, {**examples, "x": x}, key)

  return task._replace(loss=loss)


def accuracy(name: str, options: dict[str, Any], seed: int) -> float:
  """Return the last model's accuracy on the writers that never train."""
  data = with_few_labels(load_mnist_writers(), LABELLED.value, seed)
  task = mlp(data.example_shape, data.num_classes, (100,))
  if name == AUGMENTED:
    task = augmented(task)
  optimizers = (
    optimizer("sgd", learning_rate=RATE.value),
    optimizer("sgd", learning_rate=0.5, momentum=0.9),
  )
  simulator = Simulator(
    task=task,
    algorithm=(
      fedavg(task, *optimizers, weighting="uniform")
      if name == ALL
      else fedlabels(task, *optimizers, **options)
    ),
    data=data,
    sampler=sampling.uniform(data.train.num_clients, COHORT.value),
    batching=LocalBatching(batch_size=20, epochs=EPOCHS.value),
    seed=seed,
    runtime=Runtime(lanes=1),
  )
  return seeds.trained(simulator, ROUNDS.value)["unseen/accuracy"]


def main(argv: list[str]) -> None:
  """Run all, and print the table."""
  del argv
  one_device_a_core()
  rows = seeds.compare(
    {k: functools.partial(accuracy, k, v) for k, v in cases().items()},
    SEEDS.value,
  )
  print_final_table({}, {name: seeds.told(row) for name, row in rows.items()})


if __name__ == "__main__":
  app.run(main)
