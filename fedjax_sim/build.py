"""From a config to a simulator: every section becomes what it describes.

Behind `build` nothing sees a ConfigDict. All of the config is checked here,
before anything is compiled, placed on a device or written.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedjax_sim import (
  aggregators,
  cohort,
  lanes,
  sampling,
  tasks,
  transforms,
  validate,
)
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.base import Algorithm, Task
from fedjax_sim.cohort import LocalWork
from fedjax_sim.config import MOST_WHOLE, check_fields
from fedjax_sim.data import DATASETS, PARTITIONERS, FederatedDataset
from fedjax_sim.local import WEIGHTINGS
from fedjax_sim.models import MODELS
from fedjax_sim.optimizers import OPTIMIZERS, Optimizer, optimizer
from fedjax_sim.simulator import Runtime, Simulator
from fedjax_sim.traffic import nbytes

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


def _accepted(
  chooser: str,
  name: str,
  function: Callable[..., Any],
  arguments: Mapping[str, Any],
  *hidden: str,
) -> dict[str, Any]:
  """The arguments, after a check that the function takes them.

  Args:
    chooser: the field that chose the function, such as "model.name".
    name: its value.
    function: what will be called.
    arguments: what else the section holds.
    *hidden: parameters that no config may set.

  Raises:
    UnknownNameError: it does not take one of them.
  """
  parameters = inspect.signature(function).parameters.values()
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    section = chooser.partition(".")[0]
    options = [
      f"{section}.{p.name}" for p in parameters if p.name not in hidden
    ]
    for argument in arguments:
      field = f"{section}.{argument}"
      validate.known(f"{chooser}={name!r}: field", field, options)
  return dict(arguments)


def build_data(config: ConfigDict) -> FederatedDataset:
  """The federated data of a config."""
  section = config.data
  load = validate.lookup("data.name", section.name, DATASETS)
  if section.partition is not None:
    validate.known("data.partition", section.partition, PARTITIONERS)
  arguments = _given(section, "name")
  return load(**_accepted("data.name", section.name, load, arguments))


def build_task(config: ConfigDict, data: FederatedDataset) -> Task:
  """The model's task, in the precision that the config asks for."""
  section = config.model
  make = validate.lookup("model.name", section.name, MODELS)
  if not data.num_classes:
    raise ValueError(
      f"model.name={section.name!r} tells classes apart, but the labels 'y' of"
      f" data.name={config.data.name!r} are no whole numbers; give integer"
      " labels from 0."
    )
  arguments = _given(section, "name")
  task = make(
    data.example_shape,
    data.num_classes,
    **_accepted(
      "model.name",
      section.name,
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


def _optimizer(config: ConfigDict, section: str, *without: str) -> Optimizer:
  name = config[section].optimizer
  make = validate.lookup(f"{section}.optimizer", name, OPTIMIZERS)
  arguments = _accepted(
    f"{section}.optimizer",
    name,
    make,
    _given(config[section], "optimizer", *without),
  )
  validate.real(
    f"{section}.learning_rate", config[section].learning_rate, least=0
  )
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
  return optimizer(name, **arguments)


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
  if section.weighting is not None:
    validate.known("algorithm.weighting", section.weighting, WEIGHTINGS)
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
      "algorithm.name",
      section.name,
      make,
      arguments,
      "task",
      "client_optimizer",
      "server_optimizer",
      "adjust",  # functions, for other algorithms
      "received",
    ),
  )


def _lanes(value: Any) -> Any:
  """`runtime.lanes`: "auto", or a number, which a flag gives as a string."""
  if isinstance(value, str) and value != "auto":
    try:
      value = int(value)
    except ValueError:
      raise ValueError(
        f"runtime.lanes={value!r} is neither 'auto' nor a whole number."
      ) from None
  if value != "auto":
    validate.whole("runtime.lanes", value, most=MOST_WHOLE)
  return value


def _check_sizes(config: ConfigDict, simulator: Simulator) -> None:
  """Refuses what no device can hold, before anything is compiled."""
  orders = cohort.capacity(
    [data.sizes for data in simulator.splits],
    simulator.works,
    simulator.sampler.sizes[-1],
    lanes=1,
    devices=1,
  ).order
  if max(orders) > MOST_WHOLE:
    raise ValueError(
      f"client.epochs={config.client.epochs}, client.steps="
      f"{config.client.steps}: a round has {max(orders):,} examples, more than"
      f" {MOST_WHOLE:,}; lower one of them."
    )
  shapes = simulator.state_shapes
  table = nbytes(shapes.clients)  # the only part that is dealt
  size = nbytes(shapes) - table + table // simulator.mesh.size
  limit = lanes.memory_limit(simulator.mesh.devices.flat[0])
  if size > limit:
    model = [f"model.{k}={v!r}" for k, v in _given(config.model).items()]
    raise ValueError(
      f"{', '.join(model)}: {simulator.num_parameters:,} parameters and what"
      f" the algorithm keeps take {size / 1e6:,.0f} MB; a device has"
      f" {limit / 1e6:,.0f} MB to give. Make the model smaller."
    )


def _check_task(config: ConfigDict, simulator: Simulator) -> None:
  """Refuses a model that does not fit the data, by tracing one batch."""
  task, shapes = simulator.task, simulator.state_shapes.server
  variables = simulator.algorithm.variables(shapes)
  batch = {
    field: jax.ShapeDtypeStruct(
      (2, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
    )
    for field, x in simulator.data.train.examples.items()
  }
  try:
    jax.eval_shape(
      lambda v, b, seed: task.loss(v, b, jax.random.key(seed)),
      variables,
      batch,
      jax.ShapeDtypeStruct((), jnp.uint32),
    )
    jax.eval_shape(task.metrics, variables, batch)
  except Exception as error:
    text = " ".join(str(error).split())
    raise ValueError(
      f"model.name={config.model.name!r} does not fit"
      f" data.name={config.data.name!r}: {text}"
    ) from error


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
  work = LocalWork(**{name: client[name] for name in _WORK})
  at_once = runtime.rounds_per_dispatch
  speed = Runtime(
    lanes=_lanes(runtime.lanes),
    devices=runtime.devices,
    rounds_per_dispatch=at_once and min(at_once, schedule.longest_stretch),
    most_rounds=min(16, schedule.longest_stretch),
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
  _check_sizes(config, simulator)
  _check_task(config, simulator)
  return Experiment(simulator=simulator, schedule=schedule)
