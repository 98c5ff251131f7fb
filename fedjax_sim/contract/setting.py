"""The tiny federation that a part is put into.

Five clients of 2 to 6 examples, of which four train in a round, two examples a
step: so clients differ in their number of steps, and some have a last batch
that is filled up.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Aggregate,
  Aggregator,
  Algorithm,
  Context,
  PyTree,
  Requirements,
  Sampler,
  Task,
  Transform,
  errors,
  references,
  validate,
)
from fedjax_sim.data import FederatedData, FederatedDataset, with_few_labels
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.training.optimizers import optimizer

SIZES = (3, 5, 2, 4, 6)  # examples of the clients
COHORT = 4
BATCHING = LocalBatching(batch_size=2)
POPULATION, DRAWN = 20, 5  # that a sampler draws from, and draws
KINDS: dict[str, type] = {
  "algorithm": Algorithm,
  "aggregator": Aggregator,
  "transform": Transform,
  "sampler": Sampler,
  "model": Task,
}
_FIRST = {  # parameters that only one kind of part takes first
  ("task",): "algorithm",
  ("example_shape", "num_classes"): "model",
  ("num_clients", "clients_per_round"): "sampler",
  ("num_clients", "size"): "sampler",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
  """A part, and all that runs with it.

  Attributes:
    kind: of the part, a key of `KINDS`.
    file: the user's file; None: not known.
    data: a few clients; see `cut`.
    task: what is trained.
    algorithm: how.
    aggregator: how updates become one.
    transforms: what happens to them; the part, if it is one, is the last.
    private_algorithm: makes the algorithm as a private run would, with uniform
      weights if it has the choice.
    draw: (clients, clients a round) -> the sampler.
    population: how many clients the sampler draws from.
    drawn: how many it draws.
  """

  kind: str
  file: str | None
  data: FederatedDataset
  task: Task
  algorithm: Algorithm
  aggregator: Aggregator
  transforms: tuple[Transform, ...]
  private_algorithm: Callable[[], Algorithm]
  draw: Callable[[int, int], Sampler]
  population: int = POPULATION
  drawn: int = DRAWN

  @property
  def cohort(self) -> np.ndarray:
    """The clients of a round, ids, int64."""
    if self.algorithm.requirements.pools_data:
      return np.zeros(1, np.int64)
    count = self.data.train.num_clients
    # Not in the order of their ids, and the last ones among them.
    return np.arange(count)[::-1][:COHORT].copy()


def federation() -> FederatedDataset:
  """Return five clients with three Gaussian classes of images of 4 by 4 pixels.

  One "x" is a row of 16 numbers, as models that take digits want them.
  The server has five examples of its own, and two fifths of the labels are
  known, for algorithms that need such data.
  """
  rng = np.random.default_rng(0)
  count = sum(SIZES)
  y = rng.integers(0, 3, count).astype(np.int32)
  centers = rng.normal(size=(3, 16))
  x = (centers[y] + 0.7 * rng.normal(size=(count, 16))).astype(np.float32)
  dataset = FederatedDataset(
    name="five clients",
    train=FederatedData(
      examples={"x": x, "y": y},
      offsets=np.concatenate([[0], np.cumsum(SIZES)]),
    ),
    num_classes=3,
    example_shape=(16,),
    server={"x": x[:5], "y": y[:5]},
  )
  return with_few_labels(dataset, 0.4)


def cut(data: FederatedDataset) -> FederatedDataset:
  """Return a few examples of a data set's first clients, as `SIZES` says.

  Args:
    data: any; sets for evaluation are left out.
  """
  few = functools.partial(_few, count=min(len(SIZES), data.train.num_clients))
  server = data.server and {k: v[:5] for k, v in data.server.items()}
  return dataclasses.replace(
    data,
    train=few(data.train),
    splits={name: few(split) for name, split in data.splits.items()},
    seen=None,
    unseen=None,
    test=None,
    server=server,
  )


def _few(data: FederatedData, count: int) -> FederatedData:
  """Return the first examples of the first clients."""
  clients = [
    {k: np.asarray(v)[:size] for k, v in data.client(i).items()}
    for i, size in zip(range(count), SIZES, strict=False)
  ]
  sizes = [len(next(iter(client.values()))) for client in clients]
  return FederatedData(
    examples={
      k: np.concatenate([client[k] for client in clients]) for k in clients[0]
    },
    offsets=np.concatenate([[0], np.cumsum(sizes)]),
    names=data.names and tuple(data.names[:count]),
    allow_empty=data.allow_empty,
  )


def collecting(base: Algorithm) -> Algorithm:
  """Return an algorithm that takes the mean of a stack of updates itself."""

  def apply(server: PyTree, aggregate: Aggregate, context: Context) -> PyTree:
    weight = aggregate.members.weight
    total = jnp.maximum(jnp.sum(weight), 1)
    mean = jax.tree.map(
      lambda s: jnp.tensordot(weight, s, 1) / total, aggregate.update
    )
    return base.apply(server, aggregate._replace(update=mean), context)

  return base._replace(apply=apply, requirements=Requirements(all_updates=True))


def fitted(setting: Setting) -> Setting:
  """Return the setting with an aggregator, or algorithm, that fits the part."""
  stacks = not setting.aggregator.reduces
  if setting.algorithm.requirements.all_updates == stacks:
    return setting
  if setting.kind == "aggregator" and stacks:
    made = collecting(setting.algorithm)
    return dataclasses.replace(setting, algorithm=made)
  if setting.kind != "aggregator" and not stacks:
    return dataclasses.replace(setting, aggregator=aggregators.stack())
  return setting  # the simulator says what does not go together


def kind_of(function: Callable[..., Any]) -> str | None:
  """Return which kind of part a function makes; None: it does not show.

  By what it is annotated to return; by its first parameters; or, if it can be
  called without arguments, by what it returns.

  Args:
    function: a user's own.
  """
  if kind := stated_kind(function):
    return kind
  parameters = inspect.signature(function).parameters.values()
  if all(p.default is not p.empty for p in parameters):
    made = function()
    for kind, wanted in KINDS.items():
      if isinstance(made, wanted):
        return kind
  return None


def stated_kind(function: Callable[..., Any]) -> str | None:
  """Return what a function makes by its signature; it is not called.

  Args:
    function: a user's own.
  """
  if kind := annotated_kind(function):
    return kind
  names = tuple(inspect.signature(function).parameters)
  for first, kind in _FIRST.items():
    if names[: len(first)] == first:
      return kind
  return None


def annotated_kind(function: Callable[..., Any]) -> str | None:
  """Return which kind of part a function is annotated to return, if any."""
  returned = _returns(function)
  for kind, made in KINDS.items():
    if returned is made or returned == made.__name__:
      return kind
  return None


def _returns(function: Callable[..., Any]) -> Any:
  try:
    return typing.get_type_hints(function).get("return")
  except Exception:  # names that are imported for type checkers alone
    found = getattr(function, "__annotations__", {}).get("return")
    return found.rpartition(".")[2] if isinstance(found, str) else found


def setting_of(part: Any, kind: str | None = None) -> Setting:
  """Return a part in the tiny federation, with a model, FedAvg and a mean.

  Args:
    part: a function that makes it, a reference to one, or, but for an
      algorithm, the part itself.
    kind: as in `check`.

  Raises:
    TypeError, ValueError: it is no part, or of a kind that does not show.
  """
  if isinstance(part, str):
    part = references.load("part", part)
  for name, made in KINDS.items():
    if isinstance(part, made):
      kind = kind or name
  if not isinstance(part, tuple) and not callable(part):
    raise TypeError(
      f"part={part!r} is a {type(part).__name__}; give a part, the function"
      " that makes it, or 'path/to/file.py:name'."
    )
  if kind is None:
    kind = kind_of(part)
  if kind is None:
    raise ValueError(
      f"part: what {getattr(part, '__name__', part)!r} makes does not show;"
      f" give kind= one of {', '.join(KINDS)}, or annotate what it returns."
    )
  validate.one_of("kind", kind, KINDS)
  if isinstance(part, Algorithm):
    raise TypeError(
      "part is an Algorithm, made for a task of its own; give the function of"
      " (task, client_optimizer, server_optimizer) that makes it."
    )
  data = federation()
  sgd = lambda rate: optimizer("sgd", learning_rate=rate)
  if kind == "model":
    task = _made(part, kind, data.example_shape, data.num_classes)
  else:
    task = logistic_regression(data.example_shape, data.num_classes)
  algorithm = fedavg(task, sgd(0.1), sgd(1.0))
  private = lambda: algorithm
  aggregator: Aggregator = aggregators.weighted_mean()
  transforms: tuple[Transform, ...] = ()
  draw: Callable[[int, int], Sampler] = sampling.uniform
  if kind == "algorithm":
    make = functools.partial(
      _made,
      part,
      kind,
      task,
      client_optimizer=sgd(0.1),
      server_optimizer=sgd(1.0),
      num_clients=data.train.num_clients,
      mean_examples=float(data.train.sizes.mean()),
    )
    algorithm = make()
    if "weighting" in inspect.signature(part).parameters:
      private = lambda: make(weighting="uniform")
    else:
      private = lambda: algorithm
  elif kind == "aggregator":
    aggregator = _made(part, kind, clients=COHORT)
  elif kind == "transform":
    transforms = (_made(part, kind),)
  elif kind == "sampler":
    sizes = np.resize(SIZES, POPULATION)
    known = {"sizes": sizes, "label_counts": counts_like(sizes)}
    draw = lambda clients, size: _made(part, kind, clients, size, **known)
  return fitted(
    Setting(
      kind=kind,
      file=errors.code_file(inspect.unwrap(part)) if callable(part) else None,
      data=data,
      task=task,
      algorithm=algorithm,
      aggregator=aggregator,
      transforms=transforms,
      private_algorithm=private,
      draw=draw,
    )
  )


def counts_like(sizes: np.ndarray) -> np.ndarray:
  """Return label counts of clients of these sizes, shape=(clients, classes)."""
  client = np.arange(len(sizes))[:, None]
  return np.where((client + np.arange(3)) % 2, sizes[:, None], 0)


def _made(part: Any, kind: str, *given: Any, **named: Any) -> Any:
  """Return the part, made with those of the named arguments that it takes.

  Raises:
    TypeError: it is something else.
  """
  if isinstance(part, KINDS[kind]):
    return part
  parameters = types.MappingProxyType(inspect.signature(part).parameters)
  made = part(*given, **{k: v for k, v in named.items() if k in parameters})
  if not isinstance(made, KINDS[kind]):
    raise TypeError(
      f"part returned something of type {type(made).__name__}; let it return"
      f" one of type {KINDS[kind].__name__}."
    )
  return made
