"""IFCA on rotated MNIST: four models, one, or one for each machine.

Ghosh et al. 2020, "An efficient framework for clustered federated learning"
(arXiv 2006.04088), table 1, k = 4, with m = 4,800 machines of n = 50 images.
A hidden layer of 200 units; 10 full gradient steps of rate 0.1 a round, 300
rounds. A machine of the test set has 50 images, too, and takes the model with
the least loss on them. Local models take 100 steps, and are tested on all test
images of their rotation; both as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import fedjax_sim as fs
from benchmarks.papers.data import ROTATIONS
from benchmarks.papers.figure import Figure, Row, Scale, Trained, train
from fedjax_sim.config import default_config
from fedjax_sim.core import Array, PyTree, Task
from fedjax_sim.models.layers import linear
from fedjax_sim.run.opened import OpenedRun
from fedjax_sim.tasks import nnx_task

IMAGES, COHORT, LOCAL = 50, 120, 20


class Network(nnx.Module):
  """One hidden layer, which begins as PyTorch's layers do."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden = linear(784, 200, rngs=rngs)
    self.out = linear(200, 10, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """Return logits, shape=(batch, classes)."""
    return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def network(example_shape: tuple[int, ...], num_classes: int) -> Task:
  """Return the paper's model as a task."""
  del example_shape, num_classes
  return nnx_task(lambda rngs: Network(rngs=rngs))


def rows(folder: Path, scale: Scale) -> list[Row]:
  """Train four models, one, and local ones."""
  seeds = range(scale.seeds)
  config = _config()
  config.server.rounds = config.server.eval_every = 300
  config.server.clients_per_round = COHORT
  points: list[dict[str, Any]] = [
    {"algorithm.name": "ifca", "algorithm.clusters": ROTATIONS},
    {"algorithm.name": "fedavg", "algorithm.weighting": "uniform"},
  ]
  metric = "test/accuracy"
  done = train(config, folder / "shared", points, seeds, scale, metric)
  config = _config()
  config.data.kept = LOCAL
  config.algorithm.name = "ditto"  # whose own models are local with lam = 0
  config.algorithm.lam = 0.0
  config.server.rounds = 1
  config.server.clients_per_round = LOCAL
  config.client.steps = 100
  once = scale._replace(rounds=None)
  alone = train(
    config, folder / "local", [{"algorithm.lam": 0.0}], seeds, once, metric
  )
  return [
    Row("IFCA", "94.20 +- 0.03", _tested(done, _of_machines), 2),
    Row("global model", "86.74 +- 0.04", done.last(1, metric), 2),
    Row("local models", "63.32 +- 0.02", _tested(alone, _of_rotations), 2),
  ]


def _config() -> ConfigDict:
  config = default_config()
  config.data.name = "benchmarks.papers.data:rotated_mnist"
  config.model.name = "benchmarks.papers.ifca:network"
  config.client.learning_rate = 0.1
  config.client.batch_size = IMAGES
  config.client.steps = 10
  config.runtime.lanes = 1
  return config


def _tested(
  done: Trained, accuracy: Callable[[OpenedRun], float]
) -> list[float]:
  """Return the accuracy, in percent, of the runs of the first point."""
  runs = [fs.load(done.study.folder, run=name) for name in done.names[0]]
  return [100 * accuracy(run) for run in runs]


def _of_machines(run: OpenedRun) -> float:
  """Return the accuracy with the model of the least loss on 50 images."""
  correct, loss = _judged(run, run.server.fedavg.variables.params)
  by_machine = lambda x: x.reshape(len(x), -1, IMAGES).mean(axis=2)
  best = by_machine(loss).argmin(axis=0)
  chosen = np.take_along_axis(by_machine(correct), best[np.newaxis], axis=0)
  return float(chosen.mean())


def _of_rotations(run: OpenedRun) -> float:
  """Return the mean accuracy of own models on images of their rotation."""
  assert run.clients is not None
  correct, _ = _judged(run, run.clients.params)
  by_rotation = correct.reshape(len(correct), ROTATIONS, -1).mean(axis=2)
  mine = np.arange(len(correct)) * ROTATIONS // len(correct)
  return float(by_rotation[np.arange(len(correct)), mine].mean())


def _judged(run: OpenedRun, models: PyTree) -> tuple[np.ndarray, np.ndarray]:
  """Return whether each model is right, and its loss, on all test images.

  Args:
    run: whose task and test set.
    models: parameters, leaves (models, ...).

  Returns:
    Two arrays, shape=(models, images).
  """
  dataset = run.simulator.data
  assert dataset.test is not None
  test, whole = dataset.test, run.variables

  @jax.jit
  def judge(params: PyTree) -> tuple[Array, Array]:
    examples = dataset.prepare(test)
    found = run.task.metrics(whole._replace(params=params), examples)
    return found["accuracy"].total, found["loss"].total

  of_each = [
    judge(jax.tree.map(lambda x: jnp.asarray(x[i]), models))  # noqa: B023
    for i in range(len(jax.tree.leaves(models)[0]))
  ]
  correct, loss = zip(*of_each, strict=True)
  return np.stack(correct), np.stack(loss)


FIGURE = Figure(
  "Ghosh et al. 2020, 2006.04088, table 1, rotated MNIST, m = 4,800, n = 50",
  rows,
  "120 machines a round instead of all 4,800; 20 local models",
)
