"""What other simulators and this one train: models, first weights, losses.

Weights have the names and layouts of this simulator. PyTorch's are converted
by `fedjax_sim.models.pytorch`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases
from benchmarks.cases import Case
from fedjax_sim import named_variables
from fedjax_sim.core import Task
from fedjax_sim.distributed import cpu
from fedjax_sim.models.char_lstm import char_lstm
from fedjax_sim.models.femnist_cnn import femnist_cnn
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.pytorch import layouts, networks
from fedjax_sim.models.pytorch.layouts import Layer
from fedjax_sim.tasks.initial import with_initial

AT_ONCE = 512  # examples of which the loss is computed
TOLERANCE = 0.1  # between final losses, as each simulator draws its cohorts


def _work(case: Case, learning_rate: float) -> dict[str, Any]:
  """Return a case of `benchmarks.cases` as `WORK` is."""
  return {
    "model": case.pytorch,
    "shape": list(case.example_shape),
    "classes": case.num_classes,
    "cohort": case.clients_per_round,
    "batch_size": case.batch_size,
    "epochs": 1,
    "learning_rate": learning_rate,
    "sigmoid": False,
    "threads": cpu.count(),
  }


WORK: Mapping[str, Any] = {
  "model": "linear",
  "shape": [784],
  "classes": 10,
  "cohort": 10,
  "batch_size": 10,
  "epochs": 1,
  "learning_rate": 0.03,
  "sigmoid": False,  # whether the outputs go through one
  # of PyTorch, where one process trains; a step of this model is too small to
  # share: with a thread for each of two busy cores a round took four to nine
  # times as long
  "threads": 1,
}
CASES: Mapping[str, Mapping[str, Any]] = {  # name -> as `WORK`
  "lr": WORK,
  "mnist": {**WORK, "sigmoid": True},
  "cnn": _work(cases.CASES["cnn"], 0.02),
  "lstm": _work(cases.CASES["lstm"], 1.0),
}


def task_of(work: Mapping[str, Any]) -> Task:
  """Return what is trained.

  Args:
    work: as `WORK`.
  """
  return _task(
    work["model"], tuple(work["shape"]), work["classes"], work["sigmoid"]
  )


@functools.cache  # so that its functions compile once
def _task(
  model: str, shape: tuple[int, ...], classes: int, sigmoid: bool
) -> Task:
  if model == "linear":
    return logistic_regression(shape, classes, sigmoid=sigmoid)
  if model == "femnist_cnn":
    return femnist_cnn(shape, classes, dropout=(0.0, 0.0))
  # with two biases, as PyTorch's LSTM has them
  return char_lstm(shape, classes, recurrent_bias=True)


def layers_of(work: Mapping[str, Any]) -> tuple[Layer, ...]:
  """Return the layers of the model in PyTorch, as `to_torch` takes them.

  Args:
    work: as `WORK`.
  """
  if work["model"] == "linear":
    return (Layer("linear", "linear", layouts.linear()),)
  if work["model"] == "femnist_cnn":
    return networks.femnist_cnn(*work["shape"][:2])
  return networks.char_lstm(recurrent_bias=True)


def first_weights(work: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Return the weights that every simulator begins with, by name.

  Args:
    work: as `WORK`.
  """
  variables = jax.jit(task_of(work).init)(jax.random.key(0))
  named = named_variables(variables)
  return {name: np.asarray(array) for name, array in named.items()}


def evaluate(
  data: Path, weights: Mapping[str, np.ndarray], work: Mapping[str, Any]
) -> tuple[float, float]:
  """Return mean cross-entropy and accuracy over all clients' labels.

  Args:
    data: what `peer_data` wrote.
    weights: by name.
    work: as `WORK`.
  """
  task = task_of(work)
  variables = with_initial(task, weights).init(jax.random.key(0))
  metrics = jax.jit(task.metrics)
  sums: dict[str, list[tuple[float, float]]] = {"loss": [], "accuracy": []}
  with np.load(data) as file:
    x, y = file["x"], file["y"]
  for i in range(0, len(x), AT_ONCE):
    part = {"x": x[i : i + AT_ONCE], "y": y[i : i + AT_ONCE]}
    found = metrics(variables, part)
    for name, of in sums.items():
      total, weight = found[name]
      of.append((float(jnp.sum(total)), float(jnp.sum(weight))))
  loss, accuracy = (
    math.fsum(a for a, _ in of) / math.fsum(b for _, b in of)
    for of in sums.values()
  )
  return loss, accuracy
