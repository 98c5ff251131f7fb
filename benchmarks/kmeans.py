"""What does privacy cost k-means?

    python -m benchmarks.kmeans --data=digits
    python -m benchmarks.kmeans --data=mnist_writers --larger=10

Ten centroids, from random points of the range, never from the data. All clients
take part in every round, and the accountant counts Poisson sampling with rate
1, that is, the leaving out of what one client sends. Inertia is the mean
squared distance to the nearest centroid, accuracy the share of examples whose
label is the most frequent one of their cluster; both on the test set of the
digits, and on the writers that never train. Mean and standard error over the
seeds, which draw first centroids and noise.

Sums of examples are what DPLloyd adds up (Su et al. 2016, arXiv 1504.05998),
instead of the gaps between examples and centroids.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import seeds
from fedjax_sim import Runtime, Simulator, optimizer, sampling
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.algorithms import kmeans as federated
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Client,
  Context,
  PyTree,
  Report,
)
from fedjax_sim.data import FederatedDataset, load_digits, load_mnist_writers
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models import kmeans as centroids
from fedjax_sim.privacy.accounting.calibration import calibrate
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.central.guard import simulated_participation
from fedjax_sim.reporting import print_final_table


class Setting(NamedTuple):
  """What suits a data set.

  Attributes:
    clip_norm: nearly all reports are longer, which makes all as long.
    count_weight: as the algorithm takes it.
    of_sums: both, where clients report sums of examples.
    delta: below 1 over the number of clients.
  """

  clip_norm: float
  count_weight: float
  of_sums: tuple[float, float]
  delta: float


SETTINGS = {
  "digits": Setting(0.5, 0.3, (1.0, 1.0), 1e-3),
  "mnist_writers": Setting(1.0, 0.5, (2.0, 4.0), 1e-3),
}
DATA = flags.DEFINE_enum("data", "digits", list(SETTINGS), "which data set")
EPSILONS = flags.DEFINE_multi_float("epsilon", [2, 4, 8, 16, 32], "after all")
COMPARED = flags.DEFINE_float("compared", 8.0, "epsilon of the variants")
LARGER = flags.DEFINE_integer("larger", 1, "of the simulated population")
ROUNDS = flags.DEFINE_integer("rounds", 10, "of every private run")
RATE = flags.DEFINE_float("learning_rate", 0.5, "of the server, with noise")
SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds")


def of_examples(algorithm: Algorithm) -> Algorithm:
  """Return the algorithm, with clients that sum up examples instead of gaps."""

  def finish(client: Client, *carries: PyTree) -> Report:
    report = algorithm.finish(client, *carries)
    gaps, counts = report.update
    shares = counts / client.hparams["count_weight"]
    sums = gaps + shares[:, None] * client.message.params["centroids"]
    return report._replace(update=federated.Clusters(sums, counts))

  def apply(server: Any, aggregate: Aggregate, context: Context) -> Any:
    sums, counts = aggregate.update
    shares = counts / context.hparams["count_weight"]
    gaps = sums - shares[:, None] * server.variables.params["centroids"]
    update = federated.Clusters(gaps, counts)
    return algorithm.apply(server, aggregate._replace(update=update), context)

  return algorithm._replace(finish=finish, apply=apply)


@functools.cache
def dataset() -> FederatedDataset:
  """Return the data that are clustered."""
  if DATA.value == "digits":
    return load_digits(num_clients=100, alpha=1.0)
  return load_mnist_writers()


def judged(found: np.ndarray) -> tuple[float, float]:
  """Return inertia and accuracy of centroids, shape=(clusters, features)."""
  data = dataset()
  test = data.test if data.unseen is None else data.unseen.examples
  assert test is not None
  x = np.asarray(data.prepare({"x": jnp.asarray(test["x"])})["x"], np.float64)
  x = x.reshape(len(x), -1)
  gaps = (x**2).sum(1)[:, None] - 2 * x @ found.T + (found**2).sum(1)[None]
  own, labels = gaps.argmin(1), np.asarray(test["y"])
  hits = [np.bincount(labels[own == j]).max() for j in np.unique(own)]
  return float(gaps.min(1).mean()), float(np.sum(hits) / len(x))


@functools.cache
def trained(
  epsilon: float,
  seed: int,
  *,
  larger: int = 1,
  rate: float | None = None,
  rounds: int | None = None,
  init: str = "uniform",
  empty: str = "split",
  least_share: float = 0.02,
  sums: bool = False,
) -> tuple[float, float]:
  """Return the inertia and the accuracy after a run.

  Args:
    epsilon: infinite: without clipping and noise.
    seed: of first centroids and noise.
    larger: by how much the simulated population is larger.
    rate: of the server; None: the flag's.
    rounds: None: the flag's.
    init: as the task takes it.
    empty: as the algorithm takes it.
    least_share: as the algorithm takes it.
    sums: of examples instead of gaps.
  """
  data, setting = dataset(), SETTINGS[DATA.value]
  norm, count_weight = setting.clip_norm, setting.count_weight
  if sums:
    norm, count_weight = setting.of_sums
  rounds = ROUNDS.value if rounds is None else rounds
  task = centroids.kmeans(data.example_shape, data.num_classes, init=init)
  algorithm = federated.kmeans(
    task,
    optimizer("sgd", learning_rate=RATE.value if rate is None else rate),
    count_weight=count_weight,
    least_share=least_share,
    empty=empty,
  )
  if sums:
    algorithm = of_examples(algorithm)
  clients = data.train.num_clients
  sampler = sampling.poisson(clients, clients)
  if math.isfinite(epsilon):
    size = float(larger * clients)
    settings = CentralDPConfig(
      clip_norm=norm,
      noise_multiplier=1.0,
      denominator=float(clients),
      simulated=(size, size) if larger > 1 else None,
    )
    assert sampler.participation is not None
    part = simulated_participation(sampler.participation, settings.simulated)
    release = settings.release._replace(simulated=None)
    delta = setting.delta / larger
    fitted = calibrate(release, part, rounds, delta, epsilon).multiplier
    settings = dataclasses.replace(settings, noise_multiplier=fitted)
    algorithm = with_central_dp(algorithm, settings)
  simulator = Simulator(
    task=task,
    algorithm=algorithm,
    data=data,
    sampler=sampler,
    batching=LocalBatching(batch_size=64),
    seed=seed,
    noise_seed=seed,  # a table that can be made again
    runtime=Runtime(lanes=1),
  )
  state = simulator.init()
  for out in simulator.run(state, rounds):
    state = out.state
  params = simulator.algorithm.variables(state.server).params
  return judged(np.asarray(params["centroids"], np.float64))


def variants() -> dict[str, dict[str, Any]]:
  """Return name -> arguments of `trained`."""
  lloyd: dict[str, Any] = {"epsilon": math.inf, "rate": 1.0, "rounds": 30}
  compared = {"epsilon": COMPARED.value, "larger": LARGER.value}
  name = f"epsilon {COMPARED.value:g}"
  return {
    "Lloyd": lloyd | {"empty": "keep", "least_share": 0.0},
    "Lloyd, empty clusters split": lloyd,
    **{
      f"epsilon {e:g}": {"epsilon": e, "larger": LARGER.value}
      for e in EPSILONS.value
    },
    f"{name}, rate 1": compared | {"rate": 1.0},
    f"{name}, empty clusters stay": compared | {"empty": "keep"},
    f"{name}, spread": compared | {"init": "spread"},
    f"{name}, sums of examples": compared | {"sums": True},
  }


def main(argv: list[str]) -> None:
  """Run all, and print the table."""
  del argv
  one_device_a_core()
  told = {
    f"{name}, {what}": lambda seed, own=own, i=i: trained(seed=seed, **own)[i]
    for name, own in variants().items()
    for i, what in enumerate(("inertia", "accuracy"))
  }
  rows = seeds.compare(told, SEEDS.value)
  print_final_table({}, {name: seeds.told(row) for name, row in rows.items()})


if __name__ == "__main__":
  app.run(main)
