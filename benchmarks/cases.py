"""What the benchmarks train: models, and random clients of realistic sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Task
from fedjax_sim.data import (
  FederatedData,
  FederatedDataset,
  as_stored,
  from_bytes,
)
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.char_lstm import char_lstm
from fedjax_sim.models.femnist_cnn import femnist_cnn
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.resnet import resnet
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training.optimizers import optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A model, its clients, and how much of it is measured at a time.

  Attributes:
    model: (example_shape, num_classes) -> the task.
    pytorch: the same model's name in `benchmarks.pytorch`.
    example_shape: of one input.
    num_classes: of the labels.
    stored: "float": as the model reads it; "byte": 0..255, divided by 255 in
      every step; "token": ids, and a label for each.
    num_clients: the population.
    clients_per_round: of them.
    mean_size: examples of a client, on average.
    sigma: of the sizes' logarithm; 0: all alike.
    batch_size: examples of a step.
    learning_rate: of the steps.
    rounds: rounds a dispatch.
    dispatches: dispatches that are timed at once.
    torch_batches: that PyTorch is timed on, at most; 10 or more.
    most_pairs: however many are asked for.
    aims: ratio -> what it should reach on a CPU.
  """

  model: Callable[..., Task]
  pytorch: str
  example_shape: tuple[int, ...]
  num_classes: int
  stored: Literal["float", "byte", "token"] = "float"
  num_clients: int = 1000
  clients_per_round: int = 10
  mean_size: float = 100.0
  sigma: float = 1.0
  batch_size: int = 10
  learning_rate: float = 0.01
  rounds: int = 16
  dispatches: int = 1
  torch_batches: int = 1000
  most_pairs: int = 7
  aims: Mapping[str, float] = dataclasses.field(default_factory=dict)


CASES: dict[str, Case] = {
  "lr": Case(
    model=logistic_regression,
    pytorch="linear",
    example_shape=(784,),
    num_classes=10,
    mean_size=60,
    rounds=64,
    dispatches=2,
    torch_batches=2000,
    # Its products are too small to be divided: one device is as fast on one
    # core, so a second device could double it.
    aims={"one_to_bare": 0.9, "all_to_one": 1.5},
  ),
  "lr_large": Case(
    model=logistic_regression,
    pytorch="linear",
    example_shape=(784,),
    num_classes=10,
    stored="byte",
    num_clients=100_000,
    clients_per_round=1000,
    mean_size=10,
    rounds=4,
    dispatches=2,
    torch_batches=2000,
  ),
  "cnn": Case(
    model=functools.partial(femnist_cnn, dropout=(0.0, 0.0)),
    pytorch="femnist_cnn",
    example_shape=(28, 28, 1),
    num_classes=62,
    num_clients=100,
    sigma=0.5,
    batch_size=20,
    rounds=1,
    torch_batches=20,
    aims={"one_to_bare": 0.9, "all_to_torch": 1.25},
  ),
  "lstm": Case(
    model=char_lstm,
    pytorch="char_lstm",
    example_shape=(80,),
    num_classes=80,
    stored="token",
    num_clients=100,
    mean_size=12,
    sigma=0.5,
    batch_size=4,
    rounds=1,
    torch_batches=16,
    aims={"one_to_bare": 0.9, "all_to_torch": 1.0},
  ),
  "resnet18": Case(
    model=resnet,
    pytorch="resnet18",
    example_shape=(24, 24, 3),
    num_classes=100,
    num_clients=50,
    clients_per_round=2,
    mean_size=40,
    sigma=0.0,
    batch_size=20,
    rounds=1,
    torch_batches=10,
    most_pairs=3,
  ),
}


def smoke(case: Case) -> Case:
  """Return the case, small enough for a test."""
  return dataclasses.replace(
    case,
    num_clients=min(case.num_clients, 40),
    clients_per_round=min(case.clients_per_round, 4),
    mean_size=min(case.mean_size, 20),
    rounds=min(case.rounds, 2),
    dispatches=1,
    torch_batches=4,
    aims={},
  )


def with_cohort(case: Case, size: int) -> Case:
  """Return the case with larger cohorts, in so many fewer rounds a dispatch."""
  rounds = case.rounds * case.clients_per_round // size
  return dataclasses.replace(
    case,
    clients_per_round=size,
    num_clients=max(case.num_clients, size),
    rounds=min(case.rounds, max(1, rounds)),
  )


def sizes(case: Case, seed: int = 0) -> np.ndarray:
  """Return lognormal sizes of the clients, shape=(num_clients,), int64."""
  rng = np.random.default_rng(seed)
  # exp(mu + sigma^2 / 2) is the mean.
  mu = np.log(case.mean_size) - case.sigma**2 / 2
  drawn = rng.lognormal(mu, case.sigma, case.num_clients)
  return np.maximum(np.rint(drawn), 1).astype(np.int64)


def dataset(case: Case, seed: int = 0) -> FederatedDataset:
  """Return the data of random clients."""
  rng = np.random.default_rng([seed, 1])
  offsets = np.concatenate([[0], np.cumsum(sizes(case, seed))])
  count, shape = int(offsets[-1]), case.example_shape
  y = rng.integers(0, case.num_classes, count, dtype=np.int32)
  x: np.ndarray
  if case.stored == "byte":
    x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
  elif case.stored == "token":  # 0 would be padding
    x = rng.integers(1, case.num_classes, (count, *shape), dtype=np.int32)
    y = rng.integers(1, case.num_classes, (count, *shape), dtype=np.int32)
  else:
    x = rng.standard_normal((count, *shape), dtype=np.float32)
  return FederatedDataset(
    name="random",
    train=FederatedData(examples={"x": x, "y": y}, offsets=offsets),
    num_classes=case.num_classes,
    example_shape=shape,
    prepare=from_bytes if case.stored == "byte" else as_stored,
  )


def simulator(
  case: Case,
  task: Task,
  data: FederatedDataset,
  *,
  devices: int | None,
  lanes: int | Literal["auto"] | None = None,
) -> Simulator:
  """Return a simulator of FedAvg with one local epoch.

  Args:
    case: what is trained.
    task: its model.
    data: its clients.
    devices: see `Runtime`.
    lanes: see `Runtime`; None: 1 on a CPU, else "auto".
  """
  if lanes is None:
    lanes = 1 if jax.default_backend() == "cpu" else "auto"
  return Simulator(
    task=task,
    algorithm=fedavg(
      task,
      optimizer("sgd", learning_rate=case.learning_rate),
      optimizer("sgd", learning_rate=1.0),
    ),
    data=data,
    sampler=sampling.uniform(data.train.num_clients, case.clients_per_round),
    batching=LocalBatching(batch_size=case.batch_size),
    runtime=Runtime(
      lanes=lanes, devices=devices, rounds_per_dispatch=case.rounds
    ),
  )
