"""The replaceable parts of a config, and the fields that each one takes.

A `Slot` is a field that names a component, such as `algorithm.name`. The other
fields of its section are the parameters of that component: their types and
defaults are those of its signature, and what they mean is in its docstring. So
a new component needs its file and its line of registry, and nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import docstring_parser
import numpy as np
import optax
from ml_collections import ConfigDict

from fedjax_sim import aggregators, sampling, transforms
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.attacks import ATTACKS, Attack
from fedjax_sim.attacks.selection import SELECTIONS
from fedjax_sim.config.field import NAMES, Field
from fedjax_sim.core import (
  Aggregator,
  Algorithm,
  Sampler,
  Task,
  Transform,
  references,
  validate,
)
from fedjax_sim.data import DATASETS, PARTITIONERS, FederatedDataset
from fedjax_sim.models import MODELS
from fedjax_sim.privacy.central.options import MECHANISMS
from fedjax_sim.privacy.leakage import STATISTICS
from fedjax_sim.privacy.local import Randomizer, registry
from fedjax_sim.privacy.secure.aggregators import SECURE
from fedjax_sim.reporting import trackers
from fedjax_sim.reporting.trackers import Tracker
from fedjax_sim.tasks.lora import ADAPTERS
from fedjax_sim.training.optimizers import OPTIMIZERS


class Slot(NamedTuple):
  """A field of a config that names a component.

  Attributes:
    section: of the config.
    key: the field in it that holds the name.
    registry: the components that there are, by name.
    returns: what a component returns.
    title: what a list of the components is called.
    positional: how many parameters the builder gives first, by position.
    filled: parameters that the builder gives by name.
    defaults: parameters -> a default instead of the signature's.
    references: whether it may name a user's own, `path/to/file.py:name`.
    switch: a field of the section; where it is None there is no component.
    common: fields that the builder reads, whatever the component.
  """

  section: str
  key: str
  registry: Mapping[str, Callable[..., Any]]
  returns: type
  title: str
  positional: int = 0
  filled: Sequence[str] = ()
  defaults: Mapping[str, Any] = types.MappingProxyType({})
  references: bool = True
  switch: str = ""
  common: Mapping[str, Field] = types.MappingProxyType({})

  @property
  def field(self) -> str:
    """The name of the field, with its section."""
    return f"{self.section}.{self.key}"

  def factory(self, name: str) -> Callable[..., Any]:
    """Return the component's function.

    Raises:
      UnknownNameError, BadReferenceError: there is none of that name.
    """
    if not self.references:
      return validate.lookup(self.field, name, self.registry)
    return references.lookup(self.field, name, self.registry, self.returns)

  def own_fields(self, name: str) -> dict[str, Field]:
    """Return `fields`, with the defaults of the component's signature."""
    function, filled = self.factory(name), list(self.filled)
    if self.positional:
      filled += [*inspect.signature(function).parameters][: self.positional]
    return fields_of_function(function, filled)

  def fields(self, name: str) -> dict[str, Field]:
    """Return the fields that a component takes, by name, in its own order.

    Those that are common to all components of the slot come last.

    Raises:
      UnknownNameError, BadReferenceError: there is none of that name.
    """
    found = self.own_fields(name)
    for key, default in self.defaults.items():
      if key in found:
        found[key] = dataclasses.replace(found[key], default=default)
    return {**found, **self.common}


_OPTIMIZERS = (OPTIMIZERS, optax.GradientTransformation)
_MASKS = ("mask", "weight_decay_mask", "trust_ratio_mask")  # pytrees
SLOTS = (
  Slot(
    *("data", "name", DATASETS, FederatedDataset, "data sets"),
    filled=["seed"],
  ),
  Slot(
    *("data", "partition", PARTITIONERS, np.ndarray, "partitions"),
    positional=1,
    filled=["num_clients", "seed", "min_examples"],
  ),
  Slot(*("model", "name", MODELS, Task, "models"), positional=2),
  Slot(
    *("adapter", "name", ADAPTERS, Task, "adapters of models"),
    positional=1,
  ),
  Slot(
    *("algorithm", "name", ALGORITHMS, Algorithm, "algorithms"),
    positional=1,
    filled=[
      *("client_optimizer", "server_optimizer"),
      *("num_clients", "mean_examples"),
    ],
  ),
  Slot(
    *("client", "optimizer", *_OPTIMIZERS, "optimizers of clients"),
    filled=_MASKS,
    defaults={"learning_rate": 0.1},
  ),
  Slot(
    *("server", "optimizer", *_OPTIMIZERS, "optimizers of the server"),
    filled=_MASKS,
    defaults={"learning_rate": 1.0},
  ),
  Slot(
    *("sampler", "name", sampling.SAMPLERS, Sampler, "samplers"),
    positional=2,
    filled=["sizes", "label_counts"],
  ),
  Slot(
    *("aggregator", "name", {**aggregators.AGGREGATORS, **SECURE}, Aggregator),
    "aggregators",
    filled=["clients"],
  ),
  Slot(
    *("aggregator", "inner", aggregators.ROBUST, Aggregator),
    "aggregators of buckets",
    references=False,
  ),
  Slot(
    *("attack", "name", ATTACKS, Attack, "attacks"),
    filled=["num_classes"],
    common={
      "fraction": Field(float, 0.2, meaning="of the clients attack"),
      "selection": Field(
        str,
        SELECTIONS[0],
        meaning="'fixed': the same clients in all rounds, drawn by the seed;"
        " 'round': a share of each cohort, drawn anew",
      ),
    },
  ),
  Slot(
    *("replay", "optimizer", *_OPTIMIZERS, "optimizers of replay"),
    filled=_MASKS,
    defaults={"learning_rate": 0.01},
    switch="steps",
  ),
  Slot(
    *("privacy", "mechanism", MECHANISMS, dict, "mechanisms of privacy"),
    references=False,
  ),
  Slot(
    *("leakage", "statistic", STATISTICS, Algorithm, "statistics of leakage"),
    positional=2,
    filled=["statistic"],
    references=False,
  ),
  Slot(
    *("local_privacy", "mechanism", registry.RANDOMIZERS, Randomizer),
    "mechanisms of local privacy",
  ),
)
LABELED = (  # of each section in `transforms`, `downlink` and `trackers`
  Slot(
    *("transforms", "name", transforms.TRANSFORMS, Transform, "transforms"),
    common={
      "error_feedback": Field(
        bool, False, meaning="send later what it took off a client's update"
      ),
      "ef21": Field(
        bool, False, meaning="transform what is new in a client's update"
      ),
    },
  ),
  Slot(
    *("downlink", "name", transforms.TRANSFORMS, Transform),
    "transforms of what the server sends",
  ),
  Slot(
    *("trackers", "name", trackers.TRACKERS, Tracker, "trackers"),
    common={
      "metrics": Field(
        tuple,
        None,
        optional=True,
        meaning="patterns of the metrics to send, such as ('test/*',); None:"
        " all",
      ),
      "primary_metric": Field(
        str,
        None,
        optional=True,
        meaning="a metric that is sent under its last part, too:"
        " test/accuracy as accuracy",
      ),
      "wait": Field(
        float,
        30.0,
        meaning="seconds that the end of a run waits for what is not yet sent",
      ),
    },
  ),
)


def labeled_slot(section: str, label: str) -> Slot:
  """Return the slot of a section such as `transforms.<label>`."""
  (slot,) = (slot for slot in LABELED if slot.section == section)
  return slot._replace(section=f"{section}.{label}")


def slots_of(section: str) -> list[Slot]:
  """Return the slots of a section, in the order in which they are read."""
  return [slot for slot in SLOTS if slot.section == section]


def fields_of_function(
  function: Callable[..., Any], filled: Sequence[str] = ()
) -> dict[str, Field]:
  """Return the fields that a function's parameters make, by name.

  A parameter that no config can hold, such as a function, makes none.

  Args:
    function: any, annotated or not.
    filled: parameters that make none.
  """
  try:
    made = _fields_of_hashable(function)
  except TypeError:  # it has no hash, or a field of it has none
    made = _all_fields(function)
  return {name: field for name, field in made.items() if name not in filled}


def _all_fields(function: Callable[..., Any]) -> Mapping[str, Field]:
  try:
    hints = typing.get_type_hints(function)
  except Exception:  # names that are imported for type checkers alone
    hints = {}
  found = {}
  for name, parameter in inspect.signature(function).parameters.items():
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    hint = hints.get(name, _annotation(parameter))
    field = _field(hint, parameter.default)
    if field is not None:
      found[name] = field
  return types.MappingProxyType(found)


# A config asks many times for most components.
_fields_of_hashable = functools.lru_cache(1024)(_all_fields)


def _annotation(parameter: inspect.Parameter) -> Any:
  """Return the annotation, where it is text as far as it names known types."""
  known = {kind.__name__: kind for kind in NAMES}
  hint = parameter.annotation
  if isinstance(hint, str):
    parts = [part.strip() for part in hint.split("|")]
    if all(part in known or part == "None" for part in parts):
      kinds = [known.get(part, type(None)) for part in parts]
      return typing.Union[tuple(kinds)]  # noqa: UP007
    return Any
  return Any if hint is parameter.empty else hint


def _field(hint: Any, default: Any) -> Field | None:
  """Return the field of a parameter; None: no config can hold its values."""
  found = [_kind(part) for part in _parts(hint)]
  optional = type(None) in found or default is None
  kinds = {kind for kind in found if kind not in (None, type(None))}
  if kinds in ({int, float}, {bool, int, float}):  # the latter of optax
    kinds = {float}
  if object in kinds and isinstance(default, tuple(NAMES)):
    kinds = {type(default)}
  given = default is not inspect.Parameter.empty
  if not kinds or (
    given and (callable(default) or isinstance(default, np.ndarray))
  ):
    return None
  return Field(kinds.pop() if len(kinds) == 1 else object, default, optional)


def _parts(hint: Any) -> Iterator[Any]:
  """Yield the members of a union, and of unions within it."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    for part in typing.get_args(hint):
      yield from _parts(part)
  elif typing.get_origin(hint) is typing.Literal:
    yield from {type(value) for value in typing.get_args(hint)}
  else:
    yield hint


def _kind(hint: Any) -> type | None:
  """Return the kind of a field for a type that is no union; None: no kind."""
  origin = typing.get_origin(hint) or hint
  if hint is None:
    return type(None)
  if origin is Any or origin is object:
    return object
  if not isinstance(origin, type):
    return None
  if issubclass(origin, type(None)) or origin in (bool, int, float, str):
    return origin
  if issubclass(origin, os.PathLike):
    return str
  if origin in (tuple, list, Sequence):
    return tuple
  return None


def given_fields(config: ConfigDict, slot: Slot) -> dict[str, Any]:
  """Return the arguments that a section has for a slot's component.

  Those with the value that the component has by itself are left out, so that
  what no config sets stays a constant; but for those that the slot has a
  default for, which are numbers that schedules change.

  Args:
    config: complete.
    slot: its component is there.
  """
  section = section_of(config, slot.section)
  own = slot.own_fields(section[slot.key])
  return {
    name: section[name]
    for name, field in own.items()
    if name in section
    and (name in slot.defaults or not _same(section[name], field.default))
  }


def _same(value: Any, default: Any) -> bool:
  """Return whether a value equals the default; NaN equals NaN."""
  if isinstance(value, float) and isinstance(default, float):
    return value == default or (math.isnan(value) and math.isnan(default))
  return type(value) is type(default) and bool(value == default)


def section_of(config: ConfigDict, name: str) -> Any:
  """Return a section, such as "client" or "transforms.clip"."""
  for part in name.split("."):
    config = config[part]
  return config


def meanings_of(function: Callable[..., Any]) -> dict[str, str]:
  """Return what a docstring says of each parameter, on one line each."""
  parsed = docstring_parser.parse(inspect.getdoc(function) or "")
  return {
    p.arg_name: " ".join((p.description or "").split()) for p in parsed.params
  }


def make(config: ConfigDict, slot: Slot, *filled: Any, **named: Any) -> Any:
  """Call a slot's component with the fields of its section; return the result.

  Args:
    config: complete.
    slot: its component is there.
    *filled: the builder's arguments, by position.
    **named: the builder's arguments, by name; those that the component does
      not take are left out.

  Raises:
    TypeError, ValueError, OSError, ImportError: from the component; a message
      about one of its parameters begins with the section.
  """
  name = section_of(config, slot.section)[slot.key]
  function = slot.factory(name)
  taken = inspect.signature(function).parameters
  every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
  named = {k: v for k, v in named.items() if k in taken or every}
  arguments = given_fields(config, slot)
  try:
    return function(*filled, **named, **arguments)
  except (TypeError, ValueError) as error:
    text = in_section(slot, name, str(error))
    if text == str(error):
      raise
    raise type(error)(text) from error


def in_section(slot: Slot, name: str, text: str) -> str:
  """Return a component's message with the section before its parameters.

  Before those that a value follows, and those that are to be set or unset; a
  word such as "delta" may be a word.
  """
  names = "|".join(sorted([slot.key, *slot.own_fields(name)], reverse=True))
  value = r"(?=(?:\[\d+\])?=)"
  given = rf"(?<![\w.])({names}){value}|(?<=set )({names})\b|^({names})(?=:)"
  return re.sub(given, lambda m: f"{slot.section}.{m[0]}", text)
