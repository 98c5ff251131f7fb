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
from fedjax_sim.data import DATASETS, PARTITIONERS, FederatedDataset
from fedjax_sim.local import WEIGHTINGS
from fedjax_sim.models import MODELS
from fedjax_sim.optimizers import OPTIMIZERS, Optimizer, optimizer
from fedjax_sim.simulate import Runtime, Simulator
from fedjax_sim.traffic import nbytes

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def default_config() -> ConfigDict:
  """Every field of a run, at its default.

  Returns:
    An unlocked ConfigDict; a config file may add what its data set, model,
    algorithm or optimizers take.
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


# --- from a file --------------------------------------------------------------


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
  """The config of a file, locked, with some fields changed.

  Args:
    spec: the file, or `file:arg` for `get_config(arg)`.
    overrides: "section.field" -> its value as text, as on the command line;
      "None" unsets a field.

  Raises:
    OSError: the file cannot be read.
    ValueError: it raises or returns no ConfigDict, or there is no such field
      or no such value.
  """
  path, colon, arg = spec.partition(":")
  try:
    source = Path(path).read_bytes()
  except FileNotFoundError:
    raise FileNotFoundError(f"--config={path}: there is no such file") from None
  except OSError as error:
    raise OSError(f"--config={path}: {error.strerror}") from error
  names: dict[str, Any] = {"__name__": "config", "__file__": path}
  try:
    # Unlike an import it leaves no __pycache__ beside the file.
    exec(compile(source, path, "exec"), names)
    if "get_config" not in names:
      raise ValueError("it defines no get_config()")
    config = names["get_config"](*([arg] if colon else []))
    if not isinstance(config, ConfigDict):
      raise TypeError(
        f"get_config() returned a {type(config).__name__}; return what"
        " default_config() gives, with changes"
      )
  except (Exception, SystemExit) as error:
    raise ValueError(f"--config={path}{_blame(path, error)}") from error
  for field, text in (overrides or {}).items():
    _override(config, field, text)
  config.lock()
  return config


def _blame(path: str, error: BaseException) -> str:
  """Where a config file raised, and what, on one line."""
  lines: list[int | None] = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == path
  ]
  text = str(error)
  if isinstance(error, SyntaxError):
    lines, text = [error.lineno], error.msg
  where = f", line {lines[-1]}" if lines else ""
  return " ".join([f"{where}: {type(error).__name__}:", *text.split()])


def _bool(text: str) -> bool:
  return {"true": True, "false": False}[text.lower()]


# type of a field -> how text becomes one, and what to give
_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
  bool: (_bool, "True or False"),
  int: (int, "a whole number"),
  float: (float, "a number"),
  str: (str, "a text"),
  tuple: (ast.literal_eval, "a tuple such as '(64, 32)' or '(64,)'"),
}
_LITERAL = (ast.literal_eval, "a Python literal of the same type")


def _override(config: ConfigDict, field: str, text: str) -> None:
  """Sets a field from text."""
  flag = f"--config.{field}={text}"
  *sections, key = field.split(".")
  section: Any = config
  for name in sections:
    section = section[validate.known(f"{flag}: section", name, section)]
    if not isinstance(section, ConfigDict):
      raise ValueError(f"{flag}: {name} is a field and no section.")
  validate.known(f"{flag}: field", key, section)
  if isinstance(section[key], ConfigDict):
    fields = ", ".join(section[key])
    raise ValueError(
      f"{flag}: {key} is a section; set a field of it: {fields}."
    )
  read, wanted = _READERS.get(section.get_type(key), _LITERAL)
  try:
    section[key] = None if text == "None" else read(text)
  except Exception:  # whatever the reader or the ConfigDict raises
    raise ValueError(f"{flag}: give {wanted}.") from None


# --- to a simulator -----------------------------------------------------------


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


def resolved(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON holds it.

  Raises:
    TypeError: a field holds something else; names it.
  """
  for field, value in _fields(config):
    try:
      json.dumps(value)
    except TypeError as error:
      raise TypeError(
        f"{field} holds a {type(value).__name__}; a config holds numbers,"
        " texts, bools, None and tuples of them."
      ) from error
  plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
  return plain


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Every "section.field" and its value."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """The fields in which two resolved configs differ, with both values."""
  x, y = (dict(_fields(ConfigDict(tree))) for tree in (a, b))
  missing = "(missing)"
  return [
    f"{k}: {x.get(k, missing)!r} -> {y.get(k, missing)!r}"
    for k in sorted(x.keys() | y.keys())
    if x.get(k, missing) != y.get(k, missing)
  ]


_SEEDS = ("seed", "data.seed")  # they have bounds of their own
_MOST_WHOLE = 2**31 - 1


def _fits_float32(value: float) -> bool:
  """Whether float32 holds it, and not as 0 or infinity."""
  limits = np.finfo(np.float32)
  return value == 0 or float(limits.tiny) <= abs(value) <= float(limits.max)


def _check_fields(config: ConfigDict) -> None:
  """Refuses missing fields, fields nobody reads, and unwieldy numbers.

  Raises:
    TypeError, ValueError: names the field.
  """
  default = default_config()
  wanted, given = dict(_fields(default)), dict(_fields(config))
  for field in wanted:
    if field not in given:
      raise ValueError(
        f"{field} is missing; let the config begin with default_config()."
      )
  for field, value in given.items():
    section = field.rpartition(".")[0]
    validate.known("config: field", field.split(".")[0], default)
    if section == "runtime":  # what reads the other sections knows their fields
      validate.known(
        "config: field", field, [f"runtime.{k}" for k in default.runtime]
      )
    if section == "transforms":
      raise TypeError(
        f"{field}={value!r} is no section; set the fields of a transform."
      )
    if isinstance(wanted.get(field), bool) and not isinstance(value, bool):
      raise TypeError(f"{field}={value!r} is neither True nor False.")
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value > _MOST_WHOLE and field not in _SEEDS:
      raise ValueError(
        f"{field}={value} is out of range; give at most {_MOST_WHOLE}."
      )
    if isinstance(value, float) and not _fits_float32(value):
      raise ValueError(
        f"{field}={value} is out of range; give 0 or a finite number that"
        " float32 holds."
      )


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
    validate.whole("runtime.lanes", value, most=_MOST_WHOLE)
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
  if max(orders) > _MOST_WHOLE:
    raise ValueError(
      f"client.epochs={config.client.epochs}, client.steps="
      f"{config.client.steps}: a round has {max(orders):,} examples, more than"
      f" {_MOST_WHOLE:,}; lower one of them."
    )
  size = nbytes(simulator.state_shapes)
  limit = lanes.memory_limit(simulator.mesh.devices.flat[0])
  if size > limit:
    model = [f"model.{k}={v!r}" for k, v in _given(config.model).items()]
    raise ValueError(
      f"{', '.join(model)}: {simulator.num_parameters:,} parameters and what"
      f" the algorithm keeps take {size / 1e9:,.1f} GB; a device has"
      f" {limit / 1e9:,.1f} GB to give. Make the model smaller."
    )


def build(config: ConfigDict) -> Experiment:
  """The experiment that a config describes; checks all of it.

  Raises:
    TypeError, ValueError, OSError, ImportError: what the message says, with
      the field.
  """
  _check_fields(config)
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
  return Experiment(simulator=simulator, schedule=schedule)
