"""Configs: the complete default, files, and from a config to a simulator.

A config file changes what `default_config()` returns; every key is there, and
None means that the default of whatever reads it holds. Behind `build` nothing
sees a ConfigDict.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fedjax_sim import aggregators, sampling, tasks, transforms, validate
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.base import Algorithm, Task
from fedjax_sim.cohort import LocalWork
from fedjax_sim.data import DATASETS, PARTITIONERS, FederatedDataset
from fedjax_sim.models import MODELS
from fedjax_sim.optimizers import Optimizer, optimizer
from fedjax_sim.simulate import Runtime, Simulator

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def default_config() -> ConfigDict:
  """Every field of a run, at its default.

  Returns:
    An unlocked ConfigDict; a config file may add what its data set, model or
    algorithm takes.
  """
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict()
  config.data.name = "digits"
  config.data.path = placeholder(str)  # None: FEDJAX_SIM_DATA
  config.data.seed = 0  # of partition and splits, whatever the run's seed
  config.data.num_clients = placeholder(int)
  config.data.partition = placeholder(str)
  config.data.alpha = placeholder(float)
  config.data.shards_per_client = placeholder(int)
  config.data.exponent = placeholder(float)
  config.data.min_examples = placeholder(int)
  config.data.heldout_fraction = placeholder(float)
  config.data.unseen_clients = placeholder(int)

  config.model = ConfigDict()
  config.model.name = "logistic_regression"
  config.model.hidden_sizes = placeholder(tuple)

  config.algorithm = ConfigDict()
  config.algorithm.name = "fedavg"
  config.algorithm.weighting = placeholder(str)
  config.algorithm.mu = placeholder(float)

  config.client = ConfigDict()
  config.client.optimizer = "sgd"
  config.client.learning_rate = 0.1
  config.client.momentum = placeholder(float)
  config.client.weight_decay = placeholder(float)
  config.client.b1 = placeholder(float)
  config.client.b2 = placeholder(float)
  config.client.eps = placeholder(float)
  config.client.batch_size = 32
  config.client.epochs = 1
  config.client.steps = placeholder(int)  # instead of epochs
  config.client.max_examples = placeholder(int)
  config.client.drop_remainder = False
  config.client.shuffle = True

  config.server = ConfigDict()
  config.server.optimizer = "sgd"
  config.server.learning_rate = 1.0
  config.server.momentum = placeholder(float)
  config.server.weight_decay = placeholder(float)
  config.server.b1 = placeholder(float)
  config.server.b2 = placeholder(float)
  config.server.eps = placeholder(float)
  config.server.rounds = 100
  config.server.clients_per_round = 10
  config.server.sampling = "uniform"
  config.server.aggregator = "weighted_mean"
  config.server.eval_every = 1

  config.transforms = ConfigDict()  # in this order; None leaves one out
  config.transforms.clip = ConfigDict({"norm": placeholder(float)})
  config.transforms.gaussian = ConfigDict({"stddev": placeholder(float)})

  config.runtime = ConfigDict()
  config.runtime.lanes = "auto"  # or a number, as a string
  config.runtime.devices = placeholder(int)
  config.runtime.rounds_per_dispatch = placeholder(int)
  config.runtime.eval_batch_size = 256
  config.runtime.checkpoint_every = 10
  config.runtime.keep_checkpoints = 3
  config.runtime.compute_dtype = "float32"
  config.runtime.remat = False
  return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """When a run evaluates, saves and ends.

  Attributes:
    rounds: the last round.
    eval_every: evaluate after every so many rounds, and after the last.
    checkpoint_every: save after every so many rounds, and after the last.
    keep_checkpoints: how many of the newest to keep, >= 2.

  Raises:
    TypeError, ValueError: a number is not whole or too small.
  """

  rounds: int
  eval_every: int
  checkpoint_every: int
  keep_checkpoints: int

  def __post_init__(self) -> None:
    validate.whole("server.rounds", self.rounds)
    validate.whole("server.eval_every", self.eval_every)
    validate.whole("runtime.checkpoint_every", self.checkpoint_every)
    validate.whole("runtime.keep_checkpoints", self.keep_checkpoints, least=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What a config describes."""

  simulator: Simulator
  schedule: Schedule


def resolved(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON holds it."""
  plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
  return plain


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """The fields in which two resolved configs differ, with both values."""

  def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
      if isinstance(value, dict):
        out |= flat(value, f"{prefix}{key}.")
      else:
        out[prefix + key] = value
    return out

  x, y = flat(a), flat(b)
  missing = "(missing)"
  return [
    f"{k}: {x.get(k, missing)!r} -> {y.get(k, missing)!r}"
    for k in sorted(x.keys() | y.keys())
    if x.get(k, missing) != y.get(k, missing)
  ]


def _given(section: ConfigDict, *without: str) -> dict[str, Any]:
  """A section's fields that are not None, but for those named."""
  return {
    key: value
    for key, value in section.items()
    if value is not None and key not in without
  }


def _accepted(
  kind: str,
  function: Callable[..., Any],
  arguments: Mapping[str, Any],
  *hidden: str,
) -> dict[str, Any]:
  """The arguments, after a check that the function takes them.

  Args:
    kind: what messages call it.
    function: what will be called.
    arguments: from a config.
    *hidden: parameters that no config may set.
  """
  parameters = inspect.signature(function).parameters.values()
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    options = [p.name for p in parameters if p.name not in hidden]
    for name in arguments:
      validate.known(f"field of {kind}", name, options)
  return dict(arguments)


def build_data(config: ConfigDict) -> FederatedDataset:
  """The federated data of a config."""
  section = config.data
  load = validate.lookup("data.name", section.name, DATASETS)
  if section.partition is not None:
    validate.known("data.partition", section.partition, PARTITIONERS)
  arguments = _given(section, "name")
  return load(**_accepted(f"data ({section.name})", load, arguments))


def build_task(config: ConfigDict, data: FederatedDataset) -> Task:
  """The model's task, in the precision that the config asks for."""
  section = config.model
  make = validate.lookup("model.name", section.name, MODELS)
  arguments = _given(section, "name")
  task = make(
    data.example_shape,
    data.num_classes,
    **_accepted(
      f"model ({section.name})",
      make,
      arguments,
      "example_shape",
      "num_classes",
    ),
  )
  dtype = validate.lookup(
    "runtime.compute_dtype", config.runtime.compute_dtype, COMPUTE_DTYPES
  )
  if dtype is not None:
    task = tasks.with_compute_dtype(task, dtype)
  return tasks.with_remat(task) if config.runtime.remat else task


def _optimizer(config: ConfigDict, name: str, *without: str) -> Optimizer:
  arguments = _given(config[name], "optimizer", *without)
  validate.real(f"{name}.learning_rate", arguments["learning_rate"], least=0)
  return optimizer(config[name].optimizer, **arguments)


_WORK = [field.name for field in dataclasses.fields(LocalWork)]
_SERVER = (
  "rounds",
  "clients_per_round",
  "sampling",
  "aggregator",
  "eval_every",
)


def build_algorithm(config: ConfigDict, task: Task) -> Algorithm:
  """The algorithm, with the optimisers that it takes."""
  section = config.algorithm
  make = validate.lookup("algorithm.name", section.name, ALGORITHMS)
  optimizers = {
    "client_optimizer": _optimizer(config, "client", *_WORK),
    "server_optimizer": _optimizer(config, "server", *_SERVER),
  }
  taken = inspect.signature(make).parameters
  arguments = _given(section, "name")
  return make(
    task,
    **{k: v for k, v in optimizers.items() if k in taken},
    **_accepted(
      f"algorithm ({section.name})",
      make,
      arguments,
      "task",
      "client_optimizer",
      "server_optimizer",
      "adjust",  # a function, for other algorithms
    ),
  )


def _lanes(value: Any) -> Any:
  """`runtime.lanes`: "auto", or a number, which a flag gives as a string."""
  if isinstance(value, str) and value != "auto":
    try:
      return int(value)
    except ValueError:
      raise ValueError(
        f"runtime.lanes={value!r} is neither 'auto' nor a whole number."
      ) from None
  return value


def build(config: ConfigDict) -> Experiment:
  """The experiment that a config describes; checks all of it.

  Raises:
    TypeError, ValueError, OSError: what the message says, with the field.
  """
  client, server, runtime = config.client, config.server, config.runtime
  schedule = Schedule(
    rounds=server.rounds,
    eval_every=server.eval_every,
    checkpoint_every=runtime.checkpoint_every,
    keep_checkpoints=runtime.keep_checkpoints,
  )
  work = LocalWork(**{name: client[name] for name in _WORK})
  speed = Runtime(
    lanes=_lanes(runtime.lanes),
    devices=runtime.devices,
    rounds_per_dispatch=runtime.rounds_per_dispatch,
    eval_batch_size=runtime.eval_batch_size,
  )
  aggregator = validate.lookup(
    "server.aggregator", server.aggregator, aggregators.AGGREGATORS
  )()
  sampler = validate.lookup(
    "server.sampling", server.sampling, sampling.SAMPLERS
  )
  chain = {k: _given(v) for k, v in config.transforms.items()}
  chain = {name: arguments for name, arguments in chain.items() if arguments}

  data = build_data(config)
  task = build_task(config, data)
  algorithm = build_algorithm(config, task)
  clients = data.train.num_clients, server.clients_per_round
  simulator = Simulator(
    task=task,
    algorithm=algorithm,
    data=data,
    sampler=sampler(*(1, 1) if algorithm.pooled else clients),
    work=work,
    aggregator=aggregator,
    transforms=transforms.from_config(chain),
    seed=config.seed,
    runtime=speed,
  )
  return Experiment(simulator=simulator, schedule=schedule)
