"""Build the algorithm of a config."""

from __future__ import annotations

import inspect

import jax
import optax
from ml_collections import ConfigDict

from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.config.build.privacy import check_local_weights
from fedjax_sim.config.build.sections import WORK_FIELDS, given_fields
from fedjax_sim.config.defaults import default_config
from fedjax_sim.core import Algorithm, Task, references, validate
from fedjax_sim.privacy.leakage import leakage
from fedjax_sim.privacy.local import local_privacy, registry
from fedjax_sim.training.optimizers import (
  OPTIMIZERS,
  Optimizer,
  by_layer,
  clipped,
  optimizer,
)
from fedjax_sim.training.replay import replay
from fedjax_sim.training.stale import stale


def _optimizer(
  config: ConfigDict, section: str, task: Task, *without: str
) -> Optimizer:
  name = config[section].optimizer
  make = references.lookup(
    f"{section}.optimizer", name, OPTIMIZERS, optax.GradientTransformation
  )
  norm = config[section].max_grad_norm
  rates = config[section].get("layer_rates")
  without += ("optimizer", "max_grad_norm", "layer_rates", "schedule")
  arguments = given_fields(config[section], *without)
  rate = config[section].learning_rate
  if rate is not None or not references.is_reference(name):
    validate.real(f"{section}.learning_rate", rate, least=0)
  owner = f"{section}.optimizer={name!r}"
  fields = default_config()[section]
  validate.arguments(owner, arguments, make, section=section, fields=fields)
  for key, value in arguments.items():
    field = f"{section}.{key}"
    if key == "weight_decay":
      validate.real(field, value, least=0)
    if key == "eps":
      validate.real(field, value, above=0)
    if key in ("momentum", "b1", "b2"):
      validate.real(field, value, least=0, most=1)
      if value == 1:
        raise ValueError(f"{field}={value} is out of range; give less than 1.")
  made = optimizer(make, **arguments)
  made.build(made.hparams)  # so that what is wrong with it shows now
  if rates is not None:
    shapes = jax.eval_shape(task.init, jax.random.key(0)).params
    made = by_layer(made, rates, shapes, f"{section}.layer_rates")
  if norm is not None:
    made = clipped(made, norm, f"{section}.max_grad_norm")
  return made


_MEANT = {  # papers' names for FedAvg with another server optimizer
  "fedadagrad": "server.optimizer='adagrad'",
  "fedadam": "server.optimizer='adam'",
  "fedavgm": "server.momentum=0.9",
  "fedyogi": "server.optimizer='yogi'",
}
_SERVER = (
  "rounds",
  "clients_per_round",
  "least_clients_per_round",
  "sampling",
  "sampling_groups",
  "sampling_population",
  "trace",
  "round_seconds",
  "aggregator",
  "eval_every",
  "test_every",
  "initial_eval",
  "best_metric",
  "fall_back",
  "stale_probability",
  "client_log",
)
_REPLAY = ("steps", "batch_size")


def build_algorithm(config: ConfigDict, task: Task) -> Algorithm:
  """The algorithm, with the optimisers that it takes."""
  section = config.algorithm
  if section.name in _MEANT:
    raise validate.UnknownNameError(
      f"algorithm.name={section.name!r}: give algorithm.name='fedavg' and"
      f" {_MEANT[section.name]}."
    )
  make = references.lookup(
    "algorithm.name", section.name, ALGORITHMS, Algorithm
  )
  optimizers = {
    "client_optimizer": _optimizer(config, "client", task, *WORK_FIELDS),
    "server_optimizer": _optimizer(config, "server", task, *_SERVER),
  }
  taken = inspect.signature(make).parameters
  arguments = given_fields(section, "name")
  # `adjust` and `received` are functions, for other algorithms.
  fixed = ("task", "adjust", "received", *optimizers)
  owner = f"algorithm.name={section.name!r}"
  validate.arguments(owner, arguments, make, hidden=fixed, section="algorithm")
  chosen = {k: v for k, v in optimizers.items() if k in taken}
  algorithm = make(task, **chosen, **arguments)
  randomizer = registry.from_config(config.local_privacy)
  if randomizer is not None:  # a late report is randomised before it is late
    check_local_weights(config, randomizer)
    algorithm = local_privacy(algorithm, randomizer)
  probability = config.server.stale_probability
  if probability is not None:
    algorithm = stale(algorithm, probability)
  algorithm = _with_leakage(config, algorithm, task)
  if config.replay.steps is None:
    for field in ("momentum", "weight_decay", "max_grad_norm"):
      if config.replay[field] is not None:
        raise ValueError(
          f"replay.{field}={config.replay[field]}: there is no replay; set"
          f" replay.steps, or unset it by --config.replay.{field}=None."
        )
  else:
    algorithm = replay(
      algorithm,
      task,
      _optimizer(config, "replay", task, *_REPLAY),
      steps=config.replay.steps,
      batch_size=config.replay.batch_size,
    )
  return algorithm


def _with_leakage(
  config: ConfigDict, algorithm: Algorithm, task: Task
) -> Algorithm:
  """The algorithm, measuring what clients give away where that is asked for."""
  given = given_fields(config.leakage)
  if not given:
    return algorithm
  if "statistic" not in given:
    field, value = next(iter(given.items()))
    raise ValueError(
      f"leakage.{field}={value!r}: nothing is measured; set leakage.statistic,"
      f" or unset it by --config.leakage.{field}=None."
    )
  if "quantile" in given and config.privacy.mechanism is not None:
    raise ValueError(
      f"leakage.quantile={given['quantile']} lets the server learn what no"
      " epsilon covers; unset it, or privacy.mechanism."
    )
  for field in ("threshold", "word_threshold"):
    if field in given and config.local_privacy.mechanism is not None:
      raise ValueError(
        f"leakage.{field}={given[field]} lets the server learn what"
        f" local_privacy.mechanism={config.local_privacy.mechanism!r} does not"
        " cover; unset one of them."
      )
  validate.arguments(
    "leakage",
    given,
    leakage,
    hidden=("algorithm", "task"),
    section="leakage",
  )
  return leakage(algorithm, task, **given)
