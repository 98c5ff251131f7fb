"""What a further client on a device takes, with adapters and without.

    python -m benchmarks.adapters

A decoder of 50 million parameters is compiled for rounds of 8 and of 16
clients, all of which a device trains at once; XLA says how many bytes each
program needs, and an eighth of the difference is a client's. Nothing is run,
and no weights are made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_sim
from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Task
from fedjax_sim.core.tree import nbytes
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.transformer.llama import llama
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.tasks import with_compute_dtype
from fedjax_sim.tasks.freezing import with_frozen_dtype
from fedjax_sim.tasks.lora import with_lora
from fedjax_sim.training.optimizers import optimizer

RANK = 8
TARGETS = (".*/attention/(query|value)/kernel",)


class Size(NamedTuple):
  """Of the decoder and of a client's batches."""

  vocabulary: int
  width: int
  layers: int
  heads: int
  time: int
  batch: int


SIZES = {
  "full": Size(16_384, 640, 8, 10, 64, 4),
  "smoke": Size(64, 32, 1, 2, 8, 2),
}
LANES = {"full": (8, 16), "smoke": (2, 4)}


class Measured(NamedTuple):
  """What XLA says of a task's rounds, in bytes.

  Attributes:
    trained: of the parameters that train.
    frozen: of those that do not.
    most: of the program with the most lanes.
    lane: of a further lane.
  """

  trained: int
  frozen: int
  most: int
  lane: float


def decoder(size: Size) -> Task:
  """Return the decoder, whose blocks are computed anew in the backward pass."""
  return llama(
    (size.time,),
    size.vocabulary,
    width=size.width,
    layers=size.layers,
    heads=size.heads,
    tied=True,
    remat_blocks=True,
  )


def simulator(task: Task, size: Size, lanes: int) -> Simulator:
  """Return rounds of `lanes` clients, each with Adam and two batches."""
  count = 2 * size.batch
  ids = np.ones((lanes * count, size.time), np.int32)
  train = FederatedData(
    examples={"x": ids, "y": ids}, offsets=np.arange(lanes + 1) * count
  )
  data = FederatedDataset(
    name="ones",
    train=train,
    num_classes=size.vocabulary,
    example_shape=(size.time,),
  )
  adam = optimizer("adam", learning_rate=1e-3)
  return Simulator(
    task=task,
    algorithm=fedavg(task, adam, optimizer("sgd", learning_rate=1.0)),
    data=data,
    sampler=sampling.uniform(lanes, lanes),
    batching=LocalBatching(batch_size=size.batch),
    aggregator=aggregators.weighted_mean(),
    seed=0,
    runtime=Runtime(lanes=lanes, devices=1, rounds_per_dispatch=1),
  )


def measure(task: Task, size: Size, lanes: tuple[int, int]) -> Measured:
  """Compile rounds of few and of many lanes, and return what they need."""
  few, many = lanes
  needed = {}
  for count in lanes:
    compiler = simulator(task, size, count).compiler
    needed[count] = compiler.program(count, count).device_bytes
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  return Measured(
    trained=nbytes(shapes.params),
    frozen=nbytes(shapes.frozen),
    most=needed[many],
    lane=(needed[many] - needed[few]) / (many - few),
  )


def main(arguments: Sequence[str] | None = None) -> None:
  """Print what a lane takes, with adapters and without."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.adapters",
    description="Memory of a further client on a device.",
  )
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  flags = parser.parse_args(arguments)
  fedjax_sim.setup()
  size, lanes = SIZES[flags.scale], LANES[flags.scale]
  base = decoder(size)
  adapted = with_lora(base, TARGETS, RANK)
  low = with_compute_dtype(adapted, jnp.bfloat16)
  single = size._replace(batch=1)
  rows = {
    "all parameters": (base, size),
    "adapters": (adapted, size),
    "adapters, batches of 1": (adapted, single),
    "adapters, bfloat16": (low, size),
    "the same, the base kept in it": (
      with_frozen_dtype(low, jnp.bfloat16),
      size,
    ),
  }
  print(f"MB; {lanes[1]} clients at once, Adam, batches of {size.batch}")
  print(f"{'':32}{'trained':>9}{'frozen':>9}{'program':>9}{'a lane':>9}")
  for name, (task, own) in rows.items():
    found = measure(task, own, lanes)
    cells = "".join(f"{x / 1e6:9.1f}" for x in found)
    print(f"{name:32}{cells}", flush=True)


if __name__ == "__main__":
  main()
