"""Build the algorithm of a config."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.attacks import (
  Attack,
  with_false_reports,
  with_poisoned_data,
)
from fedjax_sim.config import components
from fedjax_sim.config.build.attack import NOBODY
from fedjax_sim.config.build.privacy import (
  build_randomizer,
  check_local_weights,
)
from fedjax_sim.config.build.server import build_downlink
from fedjax_sim.core import Algorithm, Task, validate
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.local import with_local_dp
from fedjax_sim.training.optimizers import (
  Optimizer,
  by_layer,
  clipped,
  optimizer,
)
from fedjax_sim.training.replay import replay
from fedjax_sim.training.stale import stale


def _optimizer(config: ConfigDict, section: str, task: Task) -> Optimizer:
  """Return the optimizer of a section."""
  fields = config[section]
  (slot,) = components.slots_of(section)
  arguments = components.given_fields(config, slot)
  if "learning_rate" in arguments:
    validate.number(
      f"{section}.learning_rate", arguments["learning_rate"], ge=0
    )
  for key, value in arguments.items():
    field = f"{section}.{key}"
    if key == "weight_decay":
      validate.number(field, value, ge=0)
    if key in ("eps", "max_norm"):
      validate.number(field, value, gt=0)
    if key in ("momentum", "b1", "b2"):
      validate.number(field, value, ge=0, lt=1)
  made = optimizer(slot.factory(fields.optimizer), **arguments)
  made.build(made.hparams)  # so that what is wrong with it shows now
  if fields.get("layer_rates") is not None:
    shapes = jax.eval_shape(task.init, jax.random.key(0)).params
    rates = fields.layer_rates
    made = by_layer(made, rates, shapes, f"{section}.layer_rates")
  if fields.max_grad_norm is not None:
    made = clipped(made, fields.max_grad_norm, f"{section}.max_grad_norm")
  return made


_OPTIMIZERS = ("client", "server")
_WITHOUT_GRADIENT = ("gbdt", "gmm", "heavy_hitters")  # of a use, see models/
MOST_FINETUNING = 10_000  # epochs, or steps, of a client


def build_algorithm(
  config: ConfigDict, task: Task, sizes: np.ndarray, attack: Attack = NOBODY
) -> Algorithm:
  """Return the algorithm, with the optimizers that it takes.

  Args:
    config: complete.
    task: what clients train.
    sizes: shape=(clients,); how many examples each client has, for algorithms
      that take `num_clients` or `mean_examples`, those of a round.
    attack: what some of them do instead.

  Raises:
    TypeError, ValueError: names the field.
  """
  (slot,) = components.slots_of("algorithm")
  _check_fits(config)
  optimizers = {
    f"{section}_optimizer": _optimizer(config, section, task)
    for section in _OPTIMIZERS
    if config[section].optimizer is not None
  }
  used = np.minimum(sizes, config.client.max_examples or sizes.max())
  algorithm = components.make(
    config,
    slot,
    task,
    num_clients=len(sizes),
    mean_examples=float(used.mean()),
    **optimizers,
  )
  randomizer = build_randomizer(config)
  if randomizer is not None:  # a late report is randomized before it is late
    check_local_weights(config, randomizer)
    algorithm = with_local_dp(algorithm, randomizer)
  # Attackers neither randomize what they send, nor send two parts of it.
  algorithm = with_false_reports(algorithm, attack)
  probability = config.server.stale_probability
  if probability is not None:
    algorithm = stale(algorithm, probability)
  if config.replay.steps is not None:
    algorithm = replay(
      algorithm,
      task,
      _optimizer(config, "replay", task),
      steps=config.replay.steps,
      batch_size=config.replay.batch_size,
    )
  # After all that changes the model, and before messages get what is no model.
  algorithm = build_downlink(config, algorithm)
  algorithm = _with_leakage(config, algorithm, task)
  return with_poisoned_data(algorithm, attack)  # in leakage's passes, too


def _check_fits(config: ConfigDict) -> None:
  """Refuse a model that gradient steps do not train with what takes them."""
  model, algorithm = config.model.name, config.algorithm.name
  others = {*ALGORITHMS} - {model}  # a user's own may do what it likes
  if model in _WITHOUT_GRADIENT and algorithm in others:
    raise ValueError(
      f"algorithm.name={algorithm!r} does not fit model.name={model!r}, which"
      f" gradient steps do not train; set algorithm.name={model!r}."
    )


def build_finetuning(
  config: ConfigDict, task: Task
) -> tuple[Optimizer, LocalBatching] | None:
  """Return how clients fine-tune their models; None if they do not.

  Args:
    config: complete.
    task: what clients train.

  Raises:
    TypeError, ValueError: names the field.
  """
  client = config.client
  lengths: dict[str, Any] = {}
  for key in ("epochs", "steps"):
    field = f"finetune_{key}"
    if client[field] is not None:
      most = MOST_FINETUNING
      lengths[key] = validate.integer(f"client.{field}", client[field], le=most)
  if not lengths:
    return None
  if len(lengths) == 2:
    raise ValueError(
      f"client.finetune_epochs={lengths['epochs']} and"
      f" client.finetune_steps={lengths['steps']}: give one of them."
    )
  if client.optimizer is None:
    (key,) = lengths
    raise ValueError(
      f"client.finetune_{key}={lengths[key]} takes the client's optimizer, and"
      f" algorithm.name={config.algorithm.name!r} has none; unset it by"
      f" --config.client.finetune_{key}=None."
    )
  batching = LocalBatching(
    batch_size=client.batch_size, shuffle=client.shuffle, **lengths
  )
  return _optimizer(config, "client", task), batching


def _with_leakage(
  config: ConfigDict, algorithm: Algorithm, task: Task
) -> Algorithm:
  """Return the algorithm, measuring leakage where that is asked for."""
  section = config.leakage
  if section.statistic is None:
    return algorithm
  if section.quantile is not None and config.privacy.mechanism is not None:
    raise ValueError(
      f"leakage.quantile={section.quantile} lets the server learn what no"
      " epsilon covers; unset it, or privacy.mechanism."
    )
  for field in ("threshold", "word_threshold"):
    if (
      section[field] is not None and config.local_privacy.mechanism is not None
    ):
      raise ValueError(
        f"leakage.{field}={section[field]} lets the server learn what"
        f" local_privacy.mechanism={config.local_privacy.mechanism!r} does not"
        " cover; unset one of them."
      )
  (slot,) = components.slots_of("leakage")
  made: Algorithm = components.make(
    config, slot, algorithm, task, statistic=section.statistic
  )
  return made
