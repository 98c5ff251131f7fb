"""From a config to a simulator: every section becomes what it describes.

Behind `build` nothing sees a ConfigDict. All of the config is checked here,
before anything is compiled, placed on a device or written.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedjax_sim import (
  aggregators,
  sampling,
  tasks,
  transforms,
  validate,
)
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.algorithms.replay import replay
from fedjax_sim.algorithms.stale import stale
from fedjax_sim.base import Algorithm, Task
from fedjax_sim.config import check_fields, default_config
from fedjax_sim.data import (
  DATASETS,
  PARTITIONERS,
  FederatedDataset,
  with_few_labels,
  with_random_labels,
  with_server_data,
)
from fedjax_sim.freezing import with_frozen
from fedjax_sim.models import MODELS
from fedjax_sim.optimizers import OPTIMIZERS, Optimizer, clipped, optimizer
from fedjax_sim.preflight import DataError, ModelError
from fedjax_sim.runtime import MOST_ROUNDS, Runtime
from fedjax_sim.simulator import Simulator
from fedjax_sim.work import LocalWork

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


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

  @property
  def longest_stretch(self) -> int:
    """Rounds without anything to do in between, at most."""
    return min(self.rounds, self.eval_every, self.checkpoint_every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What a config describes."""

  simulator: Simulator
  schedule: Schedule


def _given(section: ConfigDict, *without: str) -> dict[str, Any]:
  """A section's fields that are not None, but for those named."""
  return {
    key: value
    for key, value in section.items()
    if value is not None and key not in without
  }


_CHANGES = (  # of any data set
  "server_clients",
  "random_label_clients",
  "labelled_fraction",
)


def build_data(config: ConfigDict) -> FederatedDataset:
  """The federated data of a config."""
  section = config.data
  load = validate.lookup("data.name", section.name, DATASETS)
  if section.partition is not None:
    validate.known("data.partition", section.partition, PARTITIONERS)
  arguments = _given(section, "name", *_CHANGES)
  owner = f"data.name={section.name!r}"
  validate.arguments(owner, arguments, load, section="data")
  try:
    data = load(**arguments)
    if section.server_clients is not None:
      data = with_server_data(data, section.server_clients, section.seed)
    if section.random_label_clients is not None:
      fraction = section.random_label_clients
      data, _ = with_random_labels(data, fraction, section.seed)
    if section.labelled_fraction is not None:
      data = with_few_labels(data, section.labelled_fraction, section.seed)
    return data
  except (TypeError, ValueError) as error:
    raise type(error)(_of_data(config, error)) from error


def _of_data(config: ConfigDict, error: Exception) -> str:
  """The error's text; the data set's name first, if the text names nothing."""
  text, path = str(error), config.data.path
  if text.startswith("data.") or (path and str(path) in text):
    return text
  where = f", data.path={path!r}" if path else ""
  return f"data.name={config.data.name!r}{where}: {text}"


def build_task(config: ConfigDict, data: FederatedDataset) -> Task:
  """The model's task, in the precision that the config asks for."""
  section = config.model
  make = validate.lookup("model.name", section.name, MODELS)
  if not data.num_classes:
    raise ValueError(
      f"model.name={section.name!r} tells classes apart, but"
      f" data.name={config.data.name!r} has none: its labels 'y' are no whole"
      " numbers, or data.num_classes is 0. Give integer labels from 0, and"
      " leave data.num_classes out."
    )
  arguments = _given(section, "name", "frozen")
  fixed = ("example_shape", "num_classes")
  owner = f"model.name={section.name!r}"
  validate.arguments(owner, arguments, make, hidden=fixed, section="model")
  task = make(data.example_shape, data.num_classes, **arguments)
  if section.frozen is not None:
    task = with_frozen(task, section.frozen)
  dtype = validate.lookup(
    "runtime.compute_dtype", config.runtime.compute_dtype, COMPUTE_DTYPES
  )
  if dtype is not None:
    task = tasks.with_compute_dtype(task, dtype)
  return tasks.with_remat(task) if config.runtime.remat else task


def _optimizer(config: ConfigDict, section: str, *without: str) -> Optimizer:
  name = config[section].optimizer
  make = validate.lookup(f"{section}.optimizer", name, OPTIMIZERS)
  norm = config[section].max_grad_norm
  without += ("optimizer", "max_grad_norm")
  arguments = _given(config[section], *without)
  validate.real(
    f"{section}.learning_rate", config[section].learning_rate, least=0
  )
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
  made = optimizer(name, **arguments)
  if norm is None:
    return made
  return clipped(made, norm, f"{section}.max_grad_norm")


_WORK = [field.name for field in dataclasses.fields(LocalWork)]
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
  "aggregator",
  "eval_every",
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
  make = validate.lookup("algorithm.name", section.name, ALGORITHMS)
  optimizers = {
    "client_optimizer": _optimizer(config, "client", *_WORK),
    "server_optimizer": _optimizer(config, "server", *_SERVER),
  }
  taken = inspect.signature(make).parameters
  arguments = _given(section, "name")
  # `adjust` and `received` are functions, for other algorithms.
  fixed = ("task", "adjust", "received", *optimizers)
  owner = f"algorithm.name={section.name!r}"
  validate.arguments(owner, arguments, make, hidden=fixed, section="algorithm")
  chosen = {k: v for k, v in optimizers.items() if k in taken}
  algorithm = make(task, **chosen, **arguments)
  probability = config.server.stale_probability
  if probability is not None:
    algorithm = stale(algorithm, probability)
  if config.replay.steps is not None:
    algorithm = replay(
      algorithm,
      task,
      _optimizer(config, "replay", *_REPLAY),
      steps=config.replay.steps,
      batch_size=config.replay.batch_size,
    )
  return algorithm


def build(config: ConfigDict) -> Experiment:
  """The experiment that a config describes; checks all of it.

  Raises:
    TypeError, ValueError, OSError, ImportError: what the message says, with
      the field.
  """
  check_fields(config)
  client, server, runtime = config.client, config.server, config.runtime
  schedule = Schedule(
    rounds=server.rounds,
    eval_every=server.eval_every,
    checkpoint_every=runtime.checkpoint_every,
    keep_checkpoints=runtime.keep_checkpoints,
  )
  validate.whole("server.clients_per_round", server.clients_per_round)
  if server.client_log and importlib.util.find_spec("pyarrow") is None:
    raise ImportError(
      "server.client_log=True writes Parquet with pyarrow, which is not"
      " installed; pip install 'fedjax_sim[parquet]', or set it to False."
    )
  validate.real("runtime.peer_timeout", runtime.peer_timeout, least=5)
  work = LocalWork(**{name: client[name] for name in _WORK})
  at_once = runtime.rounds_per_dispatch
  speed = Runtime(
    lanes=runtime.lanes,
    devices=runtime.devices,
    model_devices=runtime.model_devices,
    deterministic_reduction=runtime.deterministic_reduction,
    residency=runtime.residency,
    rounds_per_dispatch=at_once and min(at_once, schedule.longest_stretch),
    most_rounds=min(MOST_ROUNDS, schedule.longest_stretch),
    eval_batch_size=runtime.eval_batch_size,
  )
  aggregator = validate.lookup(
    "server.aggregator", server.aggregator, aggregators.AGGREGATORS
  )()
  sampler = validate.lookup(
    "server.sampling", server.sampling, sampling.SAMPLERS
  )
  least = server.least_clients_per_round
  if least is not None:
    if server.sampling != "uniform":
      raise ValueError(
        f"server.least_clients_per_round={least} does not go with"
        f" server.sampling={server.sampling!r}; unset one of them."
      )
    sampler = functools.partial(sampler, least=least)
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
    sampler=(sampling.uniform(1, 1) if algorithm.pooled else sampler(*clients)),
    work=work,
    aggregator=aggregator,
    transforms=transforms.from_config(chain),
    seed=config.seed,
    runtime=speed,
    log_clients=server.client_log,
  )
  try:
    _ = simulator.checked
  except DataError as error:
    raise ValueError(_of_data(config, error)) from error
  except ModelError as error:
    model = [f"model.{k}={v!r}" for k, v in _given(config.model).items()]
    raise ValueError(
      f"{', '.join(model)}: {_of_data(config, error)}"
    ) from error
  return Experiment(simulator=simulator, schedule=schedule)
