"""FedBN: normalization layers stay with the clients.

Li et al. 2021, "FedBN: Federated learning on non-IID features via local batch
normalization" (arXiv 2102.07623), algorithm 1: FedAvg of all parameters but
those of batch normalization, whose scales, biases and running statistics are
every client's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax

from fedjax_sim.algorithms.private_parameters import private_parameters
from fedjax_sim.core import Algorithm, Task
from fedjax_sim.core.tree import paths_of
from fedjax_sim.tasks.freezing import BUFFERS
from fedjax_sim.training.optimizers import Optimizer


def fedbn(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  private: Sequence[str] | None = None,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg without normalization layers; see `private_parameters`.

  Args:
    task: what clients train.
    client_optimizer: of all parameters; starts anew in every round.
    server_optimizer: of the shared ones; sgd with learning rate 1 takes the
      mean.
    private: patterns of the normalization layers and their buffers; None finds
      them, see `normalization_layers`. `("buffers/",)` keeps the running
      statistics alone, as SiloBN does (Andreux et al. 2020, arXiv 2008.07424).
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a pattern is none or matches nothing, the task has no
      normalization layer, or no parameter is shared.
  """
  return private_parameters(
    task,
    client_optimizer,
    server_optimizer,
    private=normalization_layers(task) if private is None else private,
    weighting=weighting,
  )


def normalization_layers(task: Task) -> tuple[str, ...]:
  """Return patterns of a model's normalization layers, and of its buffers.

  Such a layer has a parameter called `scale`, as Flax's have, or buffers.

  Args:
    task: of the model.

  Raises:
    ValueError: there is neither.
  """
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  parameters, buffers = paths_of(shapes.params), paths_of(shapes.buffers)
  scales = [path for path in parameters if path.endswith("/scale")]
  layers = {path.rpartition("/")[0] for path in scales + buffers} - {""}
  patterns = [
    f"{re.escape(layer)}/"
    for layer in sorted(layers)
    if any(path.startswith(f"{layer}/") for path in parameters)
  ]
  patterns += [BUFFERS] * bool(buffers)
  if not patterns:
    raise ValueError(
      "algorithm.name='fedbn' finds no normalization layer, as no parameter is"
      " called 'scale' and the model has no buffers; set algorithm.private to"
      f" patterns of some of {', '.join(parameters)}."
    )
  return tuple(patterns)
