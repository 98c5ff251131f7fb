"""From a config to a simulator: every section becomes what it describes.

Behind `build` nothing sees a ConfigDict. All of the config is checked here,
before anything is compiled, placed on a device or written.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from fedjax_sim import aggregators, sampling, tasks, transforms
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.config.build.privacy import (
  build_privacy,
  check_local_weights,
  check_promise,
  is_locally_private,
  local_guarantee,
  secure_noise,
)
from fedjax_sim.config.defaults import check_fields, default_config, fields_of
from fedjax_sim.core import Aggregator, Algorithm, Task, references, validate
from fedjax_sim.data import (
  DATASETS,
  PARTITIONERS,
  FederatedDataset,
  preprocess,
  with_few_labels,
  with_random_labels,
  with_server_data,
)
from fedjax_sim.engine import residency as residencies
from fedjax_sim.engine.batching import LocalWork
from fedjax_sim.models import MODELS
from fedjax_sim.privacy.leakage import leakage
from fedjax_sim.privacy.local import local_privacy, registry
from fedjax_sim.privacy.secure.aggregators import SECURE, fixed_cohort
from fedjax_sim.sampling.available import SAMPLERS
from fedjax_sim.simulation.preflight import DataError, ModelError
from fedjax_sim.simulation.runtime import MOST_ROUNDS, Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.tasks.freezing import with_frozen
from fedjax_sim.tasks.metrics import with_metrics
from fedjax_sim.tasks.scheduled_sampling import FIELD as SCHEDULED_SAMPLING
from fedjax_sim.tasks.scheduled_sampling import with_scheduled_sampling
from fedjax_sim.training import schedules
from fedjax_sim.training.optimizers import (
  OPTIMIZERS,
  Optimizer,
  by_layer,
  clipped,
  optimizer,
)
from fedjax_sim.training.replay import replay
from fedjax_sim.training.stale import stale

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timetable:
  """When a run evaluates, saves and ends.

  Attributes:
    rounds: the last round.
    eval_every: evaluate after every so many rounds, and after the last.
    test_every: the same for the central test set alone.
    initial_eval: evaluate before the first round, too.
    checkpoint_every: save after every so many rounds, and after the last.
    keep_checkpoints: how many of the newest to keep, >= 2.
    wanted: rounds that were asked for, of which a budget may leave fewer.

  Raises:
    TypeError, ValueError: a number is not whole or too small.
  """

  rounds: int
  eval_every: int
  test_every: int
  initial_eval: bool
  checkpoint_every: int
  keep_checkpoints: int
  wanted: int

  def __post_init__(self) -> None:
    validate.whole("server.rounds", self.rounds)
    validate.whole("server.eval_every", self.eval_every)
    validate.whole("server.test_every", self.test_every)
    validate.boolean("server.initial_eval", self.initial_eval)
    validate.whole("runtime.checkpoint_every", self.checkpoint_every)
    validate.whole("runtime.keep_checkpoints", self.keep_checkpoints, least=2)

  @property
  def longest_stretch(self) -> int:
    """Rounds without anything to do in between, at most."""
    return min(self.rounds, *self.stops)

  @property
  def stops(self) -> tuple[int, ...]:
    """There is something to do at every multiple of these numbers."""
    return self.eval_every, self.test_every, self.checkpoint_every

  def evaluated(self, done: int) -> list[str]:
    """The evaluation sets that are due after so many rounds."""
    due = lambda every: done % every == 0 or done == self.rounds
    if done == 0 and not self.initial_eval:
      return []
    clients = ["seen", "unseen"] if due(self.eval_every) else []
    return (["test"] if due(self.test_every) else []) + clients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What a config describes.

  Attributes:
    simulator: what runs.
    schedule: when it does what.
    sources: `references.sources` of the config.
    local_guarantee: what local privacy guarantees; "" without any.
    secure_noise: what the noise of secure aggregation does; "" without any.
    uncovered: what a private run tells of its clients beside that; empty of
      others.
  """

  simulator: Simulator
  timetable: Timetable
  sources: Mapping[str, str]
  local_guarantee: str
  secure_noise: str
  uncovered: Sequence[str]

  @property
  def budget_end(self) -> str:
    """How a privacy budget ends the run early, in words; "" if none does."""
    rounds, wanted = self.timetable.rounds, self.timetable.wanted
    return f"ends the run after round {rounds} of {wanted}" * (rounds < wanted)


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
AUGMENTATION = ("crop", "crop_fill", "flip")  # of training batches
_PREPROCESSING = (  # of all batches, on the device
  "reshape",
  "lookup",
  "label_lookup",
  "normalize",
  "pad",
  *AUGMENTATION,
)


def build_data(config: ConfigDict) -> FederatedDataset:
  """The federated data of a config."""
  section = config.data
  load = references.lookup(
    "data.name", section.name, DATASETS, FederatedDataset
  )
  if section.partition is not None:
    references.lookup(
      "data.partition", section.partition, PARTITIONERS, np.ndarray
    )
  arguments = _given(section, "name", *_CHANGES, *_PREPROCESSING)
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
    return _preprocessed(section, data)
  except (TypeError, ValueError) as error:
    raise type(error)(_of_data(config, error)) from error


def preprocessing(config: ConfigDict) -> dict[str, Any]:
  """The fields of `data` that are set of those that change batches."""
  section = config.data
  return {
    key: section[key]
    for key in _PREPROCESSING
    if section[key] is not None and section[key] is not False
  }


def _preprocessed(
  section: ConfigDict, data: FederatedDataset
) -> FederatedDataset:
  """The data with what the section's fields do to a batch."""
  if section.reshape is not None:
    data = preprocess.with_reshape(data, section.reshape)
  if section.lookup is not None:
    data = preprocess.with_lookup(data, section.lookup, "x")
  if section.label_lookup is not None:
    data = preprocess.with_lookup(data, section.label_lookup, "y")
  if section.normalize is not None:
    if len(section.normalize) != 2:
      raise ValueError(
        f"data.normalize={section.normalize!r}: give two, the mean and the"
        " standard deviation; each a number, or one a channel."
      )
    data = preprocess.with_normalization(data, *section.normalize)
  if section.pad is not None:
    data = preprocess.with_padding(data, section.pad)
  if section.crop is not None:
    fill = {"fill": section.crop_fill} if section.crop_fill is not None else {}
    data = preprocess.with_crop(data, section.crop, **fill)
  elif section.crop_fill is not None:
    raise ValueError(
      f"data.crop_fill={section.crop_fill!r}: nothing is cropped; set"
      " data.crop, or unset it by --config.data.crop_fill=None."
    )
  return preprocess.with_flip(data) if section.flip else data


def _of_data(config: ConfigDict, error: Exception) -> str:
  """The error's text; the data set's name first, if the text names nothing."""
  text, path = str(error), config.data.path
  if text.startswith("data.") or (path and str(path) in text):
    return text
  where = f", data.path={path!r}" if path else ""
  return f"data.name={config.data.name!r}{where}: {text}"


_TASKS = (  # of any model
  "frozen",
  "scheduled_sampling",
  "schedule",
  "metrics",
)


def build_task(config: ConfigDict, data: FederatedDataset) -> Task:
  """The model's task, in the precision that the config asks for."""
  section = config.model
  make = references.lookup("model.name", section.name, MODELS, Task)
  own = references.is_reference(section.name)  # it may be no classifier
  if not data.num_classes and not own:
    raise ValueError(
      f"model.name={section.name!r} tells classes apart, but"
      f" data.name={config.data.name!r} has none: its labels 'y' are no whole"
      " numbers, or data.num_classes is 0. Give integer labels from 0, and"
      " leave data.num_classes out."
    )
  arguments = _given(section, "name", *_TASKS)
  fixed = ("example_shape", "num_classes")
  owner = f"model.name={section.name!r}"
  validate.arguments(owner, arguments, make, hidden=fixed, section="model")
  task = make(data.example_shape, data.num_classes, **arguments)
  if section.scheduled_sampling is not None:
    task = with_scheduled_sampling(task, section.scheduled_sampling)
  if section.frozen is not None:
    task = with_frozen(task, section.frozen)
  dtype = validate.lookup(
    "runtime.compute_dtype", config.runtime.compute_dtype, COMPUTE_DTYPES
  )
  if dtype is not None:
    task = tasks.with_compute_dtype(task, dtype)
  if section.metrics is not None:
    load = functools.partial(references.load, "model.metrics")
    task = with_metrics(task, [load(x) for x in section.metrics])
  return tasks.with_remat(task) if config.runtime.remat else task


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
  arguments = _given(config[section], *without)
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
    "client_optimizer": _optimizer(config, "client", task, *_WORK),
    "server_optimizer": _optimizer(config, "server", task, *_SERVER),
  }
  taken = inspect.signature(make).parameters
  arguments = _given(section, "name")
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
  given = _given(config.leakage)
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


_SCHEDULED = {  # section -> the hyper-parameter that its schedule multiplies
  "model": f"task.{SCHEDULED_SAMPLING}",
  "client": "client.learning_rate",
  "server": "server.learning_rate",
}


def build_schedules(
  config: ConfigDict, algorithm: Algorithm, task: Task
) -> dict[str, schedules.Schedule]:
  """The schedules of a config: hyper-parameter -> schedule.

  Raises:
    TypeError, ValueError: a text that calls none, or one of what the run does
      not have; names the field.
  """
  result = {}
  there = schedules.named({**algorithm.hparams, "task": task.hparams})
  for section, name in _SCHEDULED.items():
    text = config[section].schedule
    if text is None:
      continue
    result[name] = schedules.parse(f"{section}.schedule", text)
    if name not in there:
      where = f"algorithm.name={config.algorithm.name!r} has no {name}"
      if section == "model":
        where = "model.scheduled_sampling is not set"
      raise ValueError(
        f"{section}.schedule={text!r}: {where}, which it would multiply; unset"
        f" it by --config.{section}.schedule=None."
      )
    first = result[name].factor(jnp.int32(0), result[name].init())
    if section == "model" and float(first) * there[name] > 1:
      raise ValueError(
        f"model.schedule={text!r} makes the probability"
        f" {float(first) * there[name]:g}; let it be at most 1."
      )
  return result


def build_aggregator(
  config: ConfigDict, sampler: sampling.Sampler, data: FederatedDataset
) -> Aggregator:
  """The aggregator; secure ones know the largest cohort."""
  name = config.server.aggregator
  make = references.lookup(
    "server.aggregator",
    name,
    {**aggregators.AGGREGATORS, **SECURE},
    Aggregator,
  )
  given = _given(config.secure)
  if name not in SECURE:
    for field, value in given.items():
      raise ValueError(
        f"secure.{field}={value!r}: server.aggregator={name!r} is not secure;"
        f" give one of {', '.join(SECURE)}, or unset it, by"
        f" --config.secure.{field}=None."
      )
    return make()
  most = sampler.sizes[-1]
  if "noise_multiplier" in given:
    promised = sampler.participation is not None
    fixed_cohort(sampler.expected, most, promised)
  elif name == "secure_mean":
    if config.algorithm.weighting == "tokens" and "most_weight" not in given:
      raise ValueError(
        "algorithm.weighting='tokens': the largest weight is not known from the"
        " numbers of examples; set secure.most_weight."
      )
    largest = float(data.train.sizes.max())
    used = config.client.max_examples or largest
    given.setdefault("most_weight", float(min(largest, used)))
  owner = f"server.aggregator={name!r}"
  validate.arguments(owner, given, make, hidden=("clients",), section="secure")
  return make(most, **given)


def _make_sampler(config: ConfigDict) -> Callable[..., sampling.Sampler]:
  """(clients, clients a round) -> the sampler, with its other arguments."""
  server = config.server
  sampler = references.lookup(
    "server.sampling", server.sampling, SAMPLERS, sampling.Sampler
  )
  least = server.least_clients_per_round
  if least is not None:
    if server.sampling != "uniform":
      raise ValueError(
        f"server.least_clients_per_round={least} does not go with"
        f" server.sampling={server.sampling!r}; unset one of them."
      )
    sampler = functools.partial(sampler, least=least)
  groups = server.sampling_groups
  if (groups is not None) != (server.sampling == "cyclic_poisson"):
    raise ValueError(
      f"server.sampling_groups={groups} with server.sampling="
      f"{server.sampling!r}; 'cyclic_poisson' needs a number of groups, and no"
      " other sampling takes one."
    )
  if groups is not None:
    sampler = functools.partial(sampler, groups=groups)
  population = server.sampling_population
  if population is not None:
    if server.sampling != "poisson":
      raise ValueError(
        f"server.sampling_population={population} is of"
        f" server.sampling='poisson', and it is {server.sampling!r}; unset one"
        " of them."
      )
    sampler = functools.partial(sampler, population=population)
  traced = {
    k: server[k] for k in ("trace", "round_seconds") if server[k] is not None
  }
  if traced and server.sampling != "available":
    field, value = next(iter(traced.items()))
    raise ValueError(
      f"server.{field}={value!r} is of server.sampling='available', and it is"
      f" {server.sampling!r}; unset one of them."
    )
  if server.sampling == "available":
    if "trace" not in traced:
      raise ValueError(
        "server.sampling='available' needs server.trace, an .npz file of when"
        " devices are ready."
      )
    sampler = functools.partial(sampler, **traced)
  return sampler


def build(config: ConfigDict) -> Experiment:
  """The experiment that a config describes; checks all of it.

  Raises:
    TypeError, ValueError, OSError, ImportError: what the message says, with
      the field.
  """
  check_fields(config)
  client, server, runtime = config.client, config.server, config.runtime
  if runtime.residency == "disk" and config.data.name == "store":
    residencies.check_on_disk(config.data)
  timetable = Timetable(
    rounds=server.rounds,
    wanted=server.rounds,
    eval_every=server.eval_every,
    test_every=server.eval_every
    if server.test_every is None
    else server.test_every,
    initial_eval=server.initial_eval,
    checkpoint_every=runtime.checkpoint_every,
    keep_checkpoints=runtime.keep_checkpoints,
  )
  validate.whole("server.clients_per_round", server.clients_per_round)
  if server.client_log:
    try:
      importlib.import_module("pyarrow.parquet")
    except ImportError as error:
      raise ImportError(
        "server.client_log=True writes Parquet with pyarrow, which cannot be"
        f" imported ({error}); pip install pyarrow, or set it to False."
      ) from error
  validate.real("runtime.peer_timeout", runtime.peer_timeout, least=5)
  work = LocalWork(**{name: client[name] for name in _WORK})
  at_once = runtime.rounds_per_dispatch
  speed = Runtime(
    lanes=runtime.lanes,
    devices=runtime.devices,
    model_devices=runtime.model_devices,
    deterministic_reduction=runtime.deterministic_reduction,
    residency=runtime.residency,
    rounds_per_dispatch=at_once and min(at_once, timetable.longest_stretch),
    most_rounds=min(MOST_ROUNDS, timetable.longest_stretch),
    eval_batch_size=runtime.eval_batch_size,
  )
  sampler = _make_sampler(config)
  chain = {k: _given(v) for k, v in config.transforms.items()}
  chain = {name: arguments for name, arguments in chain.items() if arguments}

  data = build_data(config)
  task = build_task(config, data)
  algorithm = build_algorithm(config, task)
  clients = data.train.num_clients, server.clients_per_round
  if "sizes" in inspect.signature(sampler).parameters:  # a user's own
    sampler = functools.partial(sampler, sizes=data.train.sizes)
  fields = dict(fields_of(config))
  size = (1, 1) if algorithm.pooled else clients
  draw = sampling.uniform if algorithm.pooled else sampler
  try:
    with references.named(fields):
      drawn = draw(*size)
      check_promise(config, draw, drawn, size)
      algorithm, budget = build_privacy(config, algorithm, drawn, size[0])
      simulator = Simulator(
        task=task,
        algorithm=algorithm,
        data=data,
        sampler=drawn,
        work=work,
        aggregator=build_aggregator(config, drawn, data),
        transforms=transforms.from_config(chain),
        seed=config.seed,
        noise_seed=config.privacy.noise_seed,
        runtime=speed,
        schedules=build_schedules(config, algorithm, task),
        best_metric=server.best_metric,
        fall_back=server.fall_back,
        log_clients=server.client_log,
        budget=budget,
      )
      _ = simulator.checked
      allowed = simulator.allowed(timetable.rounds)
  except DataError as error:
    raise ValueError(_of_data(config, error)) from error
  except ModelError as error:
    model = [f"model.{k}={v!r}" for k, v in _given(config.model).items()]
    raise ValueError(
      f"{', '.join(model)}: {_of_data(config, error)}"
    ) from error
  if not allowed:
    raise ValueError(
      f"privacy.target_epsilon={config.privacy.target_epsilon}: the first round"
      " would exceed it with"
      f" privacy.noise_multiplier={config.privacy.noise_multiplier}; raise one"
      " of them."
    )
  private = simulator.algorithm.release is not None
  if is_locally_private(config, simulator.num_clients):
    simulator.check_unwatched()
    private = True
  timetable = dataclasses.replace(timetable, rounds=allowed)
  sources = references.sources(fields)
  return Experiment(
    simulator=simulator,
    timetable=timetable,
    sources=sources,
    local_guarantee=local_guarantee(config, drawn, simulator.num_parameters),
    secure_noise=secure_noise(config, drawn, simulator.num_parameters),
    uncovered=simulator.uncovered if private else [],
  )
