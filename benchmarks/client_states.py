"""What do client states of a million clients on the disk cost?

    python -m benchmarks.client_states --clients=10000,1000000 --rounds=300

SCAFFOLD with a logistic regression of MNIST's size: every client keeps a
control variate of 7,850 parameters, 31 kB. For each number of clients a process
of its own trains cohorts of 100 clients, with the rows of clients on the disk
in `--folder`, and, for the first number, with the table on the devices. Clients
have 20 examples, a byte each: which of 251 images it is. Memory is that of the
process, without the disk's cache: the most so far and at that moment, at five
rounds of the run.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.apart import apart

EXAMPLES, IMAGES, CLASSES = 20, 251, 10


def dataset(clients: int) -> Any:
  """Return clients whose examples are numbers of a few hundred images."""
  import jax.numpy as jnp

  from fedjax_sim.data import FederatedData, FederatedDataset

  rng = np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, IMAGES)
  means = rng.normal(size=(CLASSES, 784))
  images = means[labels] + rng.normal(size=(IMAGES, 784))
  images = images.astype(np.float32)

  def prepare(examples: Any) -> Any:
    number = examples["number"].astype(jnp.int32)
    x = jnp.asarray(images)[number].reshape(*number.shape, 28, 28, 1)
    return {"x": x, "y": jnp.asarray(labels, jnp.int32)[number]}

  count = clients * EXAMPLES
  numbers = np.resize(rng.permutation(IMAGES).astype(np.uint8), count)
  return FederatedDataset(
    name="shared images",
    train=FederatedData(
      examples={"number": numbers},
      offsets=np.arange(0, count + 1, EXAMPLES, dtype=np.int64),
    ),
    num_classes=CLASSES,
    example_shape=(28, 28, 1),
    prepare=prepare,
  )


def train(
  clients: int, rounds: int, cohort: int, where: Any, folder: str
) -> dict[str, Any]:
  """Train; return memory and speed by rounds, and the model's digest."""
  from fedjax_sim import (
    LocalBatching,
    Runtime,
    Simulator,
    optimizer,
    sampling,
    setup,
  )
  from fedjax_sim.algorithms.scaffold import scaffold
  from fedjax_sim.core.digests import tree_digest
  from fedjax_sim.models.logistic_regression import logistic_regression

  setup()
  data = dataset(clients)
  task = logistic_regression(data.example_shape, data.num_classes)
  rates = (0.05, 1.0)
  sgd = (optimizer("sgd", learning_rate=rate) for rate in rates)
  with tempfile.TemporaryDirectory(dir=folder or None) as place:
    simulator = Simulator(
      task=task,
      algorithm=scaffold(task, *sgd),
      data=data,
      sampler=sampling.uniform(clients, cohort),
      batching=LocalBatching(batch_size=EXAMPLES),
      runtime=Runtime(lanes=1, state_residency=where, state_folder=place),
    )
    parameters = simulator.states.num_parameters
    state = simulator.init()
    marks = [rounds * i // 5 for i in range(1, 6)]
    found, done, began, seconds = [], 0, time.perf_counter(), 0.0
    trained, warm = 0, 0.0
    for out in simulator.run(state, rounds, stops=[max(1, rounds // 5)]):
      state = out.state
      done += len(out.rows)
      if warm == 0.0:
        warm = time.perf_counter()  # compiled, and run once
      else:
        trained += out.clients
      seconds += out.seconds
      if done in marks:
        most, now = resident()
        found.append({"round": done, "peak_mb": most, "now_mb": now})
    wall = time.perf_counter() - warm
    file = Path(place) / "rows.bin"
    written = file.stat() if file.exists() else None
    return {
      "clients": clients,
      "where": where,
      "parameters": parameters,
      "table_gb": 4 * parameters * clients / 1e9,
      "memory": found,
      "clients_per_second": trained / max(wall, 1e-9),
      "wall_seconds": time.perf_counter() - began,
      "file_mb": 0.0 if written is None else 512e-6 * written.st_blocks,
      "loss": float(out.rows[-1]["train/loss"]),
      "digest": tree_digest(simulator.algorithm.variables(state.server).params),
    }


def resident() -> tuple[float, float]:
  """Return the process's memory in MB: the most so far, and now."""
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return most, pages * resource.getpagesize() / 1e6


CLIENTS = flags.DEFINE_list("clients", ["10000", "1000000"], "How many.")
ROUNDS = flags.DEFINE_integer("rounds", 300, "Of each run.")
COHORT = flags.DEFINE_integer("clients_per_round", 100, "Of a round.")
FOLDER = flags.DEFINE_string("folder", "", "Where rows are; '': temporary.")


def main(argv: list[str]) -> None:
  """Print a line for each of five rounds of every run, and its speed."""
  del argv
  sizes = [int(text) for text in CLIENTS.value]
  runs = [(sizes[0], "device"), *((size, "disk") for size in sizes)]
  for clients, where in runs:
    given = clients, ROUNDS.value, COHORT.value, where, FOLDER.value
    out = apart(train, *given)
    print(
      f"{clients:,} clients, {where}: {out['table_gb']:.2f} GB of rows in all"
    )
    for line in out["memory"]:
      print(
        f"  round {line['round']:>5}: peak {line['peak_mb']:,.0f} MB,"
        f" now {line['now_mb']:,.0f} MB"
      )
    print(
      f"  {out['clients_per_second']:,.0f} clients/s, file"
      f" {out['file_mb']:,.0f} MB, loss {out['loss']:.4f}, digest"
      f" {out['digest'][:12]}",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
