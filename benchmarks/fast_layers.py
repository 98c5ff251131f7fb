"""A round of plain Flax models, with the layers that tasks replace and without.

    python -m benchmarks.fast_layers

Each model is trained by FedAvg on one device, as it is written
(`fast_layers=False`) and in the fast forms. Both take turns, another one first
in every turn, and the table holds medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import fedjax_sim
from benchmarks import cases
from benchmarks.rounds import Engine
from benchmarks.turns import rotated
from fedjax_sim.core import Task
from fedjax_sim.models.layers import conv, max_pool
from fedjax_sim.tasks import linen_task, nnx_task

CLASSES = 62
SHAPE = (28, 28, 1)


def flax_pool(x: Any) -> Any:
  """Return Flax's own pooling of x, over windows of 2 x 2."""
  return nnx.max_pool(x, (2, 2), (2, 2))


class Plain(nnx.Module):
  """Two convolutions with pooling, and a linear layer."""

  def __init__(self, make: Any, pool: Any, rngs: nnx.Rngs):
    self.first = make(1, 32, (3, 3), rngs=rngs)
    self.second = make(32, 64, (3, 3), rngs=rngs)
    self.logits = nnx.Linear(7 * 7 * 64, CLASSES, rngs=rngs)
    self.pool = pool

  def __call__(self, x: Any) -> Any:
    """Return logits, shape=(batch, classes)."""
    x = self.pool(nnx.relu(self.first(x)))
    x = self.pool(nnx.relu(self.second(x)))
    return self.logits(x.reshape(len(x), -1))


class Linen(linen.Module):
  """The same in linen."""

  @linen.compact
  def __call__(self, x: Any) -> Any:
    """Return logits, shape=(batch, classes)."""
    for features in (32, 64):
      x = linen.relu(linen.Conv(features, (3, 3))(x))
      x = linen.max_pool(x, (2, 2), strides=(2, 2))
    return linen.Dense(CLASSES)(x.reshape(len(x), -1))


class Strided(nnx.Module):
  """Strides in the place of pooling, explicit padding, and mean pooling."""

  def __init__(self, rngs: nnx.Rngs):
    self.first = nnx.Conv(1, 32, (5, 5), strides=2, padding=2, rngs=rngs)
    self.second = nnx.Conv(32, 64, (3, 3), strides=2, padding=1, rngs=rngs)
    self.logits = nnx.Linear(64, CLASSES, rngs=rngs)

  def __call__(self, x: Any) -> Any:
    """Return logits, shape=(batch, classes)."""
    x = nnx.relu(self.second(nnx.relu(self.first(x))))
    return self.logits(nnx.avg_pool(x, (7, 7)).reshape(len(x), -1))


def models() -> dict[str, Callable[[bool], Task]]:
  """Return name -> a function that makes the task, with fast layers or not."""
  plain = lambda rngs: Plain(nnx.Conv, flax_pool, rngs)
  one = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
  return {
    "nnx": lambda fast: nnx_task(plain, fast_layers=fast),
    "linen": lambda fast: linen_task(Linen(), one, fast_layers=fast),
    "strided, padded": lambda fast: nnx_task(Strided, fast_layers=fast),
  }


def compare(tasks: dict[str, Task], turns: int, scale: str) -> list[float]:
  """Return how many times as fast as the first each other trains a round."""
  size = 20 if scale == "smoke" else 100
  case = replace(
    cases.CASES["cnn"], clients_per_round=2, mean_size=size, sigma=0.0
  )
  data = cases.dataset(case)
  engines = {
    name: Engine(cases.simulator(case, task, data, devices=1), 1, 1)
    for name, task in tasks.items()
  }
  times: dict[str, list[float]] = {name: [] for name in engines}
  for turn in range(turns + 1):
    for name in rotated(engines, turn):
      seconds = engines[name].seconds()
      if turn:  # the first one compiles and warms up
        times[name].append(seconds)
  for engine in engines.values():
    engine.close()
  first, *others = times.values()
  return [
    statistics.median(a / b for a, b in zip(first, other, strict=True))
    for other in others
  ]


def main(arguments: Sequence[str] | None = None) -> None:
  """Print how many times as fast a round is in the fast forms."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.fast_layers",
    description="Time of a round of plain Flax models.",
  )
  parser.add_argument("--turns", type=int, default=7, help="that count")
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  flags = parser.parse_args(arguments)
  if flags.turns < 1:
    parser.error("--turns: give at least 1")
  fedjax_sim.setup()
  print("speed of a round / as the model is written")
  for name, task in models().items():
    tasks = {"as written": task(False), "fast forms": task(True)}
    if name == "nnx":  # what a model of this package would be
      ours = lambda rngs: Plain(conv, max_pool, rngs)
      tasks["models.layers"] = nnx_task(ours)
    ratios = compare(tasks, flags.turns, flags.scale)
    for way, ratio in zip(list(tasks)[1:], ratios, strict=True):
      print(f"  {name}, {way:<{32 - len(name)}} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
  main()
