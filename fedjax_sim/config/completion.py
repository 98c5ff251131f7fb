"""Complete a config: every field that its components take, with its value.

`default_config()` holds the names of components and the fields that are there
whatever they are. `complete` adds the fields of the components that a config
names, with the defaults of their signatures, and refuses all others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from fedjax_sim.config.components import (
  LABELED,
  SLOTS,
  Slot,
  labeled_slot,
  make,
  meanings_of,
  section_of,
  slots_of,
)
from fedjax_sim.config.defaults import default_config
from fedjax_sim.config.field import Field
from fedjax_sim.core import validate

_ORDER = "order"  # of labeled sections, where it matters
_SEEDS = ("seed", "data.seed", "privacy.noise_seed")  # with bounds of their own
_WITHOUT = {  # section -> the parameter of algorithms that its optimizer fills
  "client": "client_optimizer",
  "server": "server_optimizer",
}


@functools.cache
def _defaults() -> ConfigDict:
  """Return the default config, made once; nobody may change it."""
  return default_config()


def complete(config: ConfigDict) -> ConfigDict:
  """Return the config with every field that its components take.

  Fields that are None and cannot be are as if they were not set. An optimizer
  that the algorithm does not take is left out, with its fields.

  Args:
    config: what a config file returns, or a complete one.

  Returns:
    A locked ConfigDict whose fields have the types of their parameters.

  Raises:
    UnknownNameError: no such component, or a field that no component takes.
    TypeError, ValueError: a field is missing, or a value does not fit.

  Example:
    config = default_config()
    config.algorithm.name = "fedprox"
    complete(config).algorithm.mu  # 0.01
  """
  fixed = _defaults()
  for name in config:
    validate.one_of("config: field", name, fixed)
  result = {}
  for name, default in fixed.items():
    if name not in config:
      raise ValueError(
        f"{name} is missing; let the config begin with default_config()."
      )
    if not isinstance(default, ConfigDict):
      value = default if config[name] is None else config[name]
      result[name] = _fixed(fixed, name, name).check(name, value)
      continue
    if not isinstance(config[name], ConfigDict):
      raise TypeError(f"{name}={config[name]!r} is no section; set its fields.")
    labeled = any(slot.section == name for slot in LABELED)
    section = _labeled if labeled else _section
    result[name] = section(config, name)
  completed = ConfigDict(result)
  completed.lock()
  return completed


def _fixed(section: ConfigDict, key: str, name: str) -> Field:
  """Return the `Field` of an entry of the default config's section `name`."""
  kind = section.get_type(key)
  default = section[key]
  # A reference to a bool, say, is none to an int; None has no type of its own.
  known = kind if kind in (bool, int, float, str, tuple) else object
  return Field(known, default, default is None, unbounded=name in _SEEDS)


def _section(config: ConfigDict, name: str) -> ConfigDict:
  """Return a section, complete."""
  defaults, given = _defaults()[name], dict(config[name])
  fields = {k: _fixed(defaults, k, f"{name}.{k}") for k in defaults}
  for key in fields:
    if key not in given:
      raise ValueError(
        f"{name}.{key} is missing; let the config begin with default_config()."
      )
  owners: list[str] = []
  chosen: list[tuple[Slot, str]] = []
  ignored: dict[str, Field] = {}
  for slot in slots_of(name):
    choice = given.get(slot.key)
    if slot.key not in fields or (slot.switch and given[slot.switch] is None):
      continue  # a loader without a partition; no replay
    choice = fields[slot.key].default if choice is None else choice
    if choice is None:
      continue
    choice = fields[slot.key].check(slot.field, choice)
    own = slot.fields(choice)
    if name in _WITHOUT and not _takes(config, _WITHOUT[name]):
      if name == "server" and _takes(config, "learning_rate"):
        _refuse_second_optimizer(config, own)
      fields[slot.key] = Field(str, None, optional=True)
      ignored = {**own, slot.key: fields[slot.key]}
      continue
    owners.append(f"{slot.field}={choice!r}")
    chosen.append((slot, choice))
    if both := sorted(own.keys() & fields.keys()):
      raise ValueError(
        f"{owners[-1]} has a parameter {both[0]!r}, and {name}.{both[0]} is"
        " something else; give the parameter another name."
      )
    fields |= _adapted(config, slot, own)
  given = {k: v for k, v in given.items() if k not in ignored}
  _refuse_unknown(name, owners, given, fields, defaults)
  return _filled(name, owners, given, fields, chosen)


def _takes(config: ConfigDict, parameter: str) -> bool:
  """Return whether the algorithm takes a parameter."""
  (slot,) = slots_of("algorithm")
  name = config.algorithm.get(slot.key) or _defaults().algorithm[slot.key]
  function = slot.factory(name)
  return parameter in inspect.signature(function).parameters


def _refuse_second_optimizer(config: ConfigDict, own: Iterable[str]) -> None:
  """Refuse a server optimizer beside an algorithm that brings its own.

  Args:
    config: whose algorithm has a learning rate of its own, the server's.
    own: fields of the optimizer that `server.optimizer` names.
  """
  server, defaults = config.server, _defaults().server
  name = f"algorithm.name={config.algorithm.name!r}"
  for key in ("optimizer", "layer_rates", "max_grad_norm", *own):
    value = server.get(key)
    if value is None or (key in defaults and value == defaults[key]):
      continue
    remedy = f"unset it by --config.server.{key}=None"
    if key == "optimizer":
      remedy += ", or take algorithm.name='fedavg'"
    if key == "learning_rate":
      remedy += f" and give algorithm.learning_rate={value}"
    raise ValueError(
      f"server.{key}={value!r}: {name} brings the server's optimizer, with its"
      f" own numbers in the section algorithm; {remedy}."
    )


def _adapted(
  config: ConfigDict, slot: Slot, fields: dict[str, Field]
) -> dict[str, Field]:
  """Return the fields with defaults that depend on other sections.

  Where a mechanism of privacy, or the noise of secure aggregation, makes all
  clients count the same, "uniform" replaces a default weighting by examples.
  """
  if slot.section != "algorithm" or "weighting" not in fields:
    return fields
  unweighted = (
    config.privacy.get("mechanism") is not None
    and config.privacy.get("max_weight") is None
  )
  unweighted |= config.aggregator.get("noise_multiplier") is not None
  if config.local_privacy.get("mechanism") is not None:
    (randomizer,) = slots_of("local_privacy")
    alone = ConfigDict({"local_privacy": _section(config, "local_privacy")})
    unweighted |= not make(alone, randomizer).weighs
  weighting = fields["weighting"]
  if unweighted and weighting.default == "examples":
    weighting = Field(weighting.kind, "uniform")
  return {**fields, "weighting": weighting}


def _refuse_unknown(
  section: str,
  owners: Sequence[str],
  given: Mapping[str, Any],
  fields: Mapping[str, Field],
  fixed: Iterable[str],
) -> None:
  """Refuse a field that is set and that nothing takes."""
  unknown = [k for k in given if k not in fields and given[k] is not None]
  if not unknown:
    return
  key = unknown[0]
  off = [s.switch or s.key for s in slots_of(section)]
  off = [name for name in off if given.get(name) is None and name in fixed]
  if off and not owners and section not in _WITHOUT:
    raise validate.UnknownNameError(
      f"{section}.{key}={given[key]!r}: nothing takes it; set"
      f" {section}.{off[0]}, or unset it by --config.{section}.{key}=None."
    )
  own = [name for name in fields if name not in fixed]
  owner = ", ".join(owners) or f"The section {section}"
  raise validate.UnknownNameError(
    validate.not_taken(owner, key, own, section, [*fixed])
  )


def _filled(
  section: str,
  owners: Sequence[str],
  given: Mapping[str, Any],
  fields: Mapping[str, Field],
  chosen: Iterable[tuple[Slot, str]],
) -> ConfigDict:
  """Return the section with every field, in the fields' types.

  Args:
    section: its name.
    owners: what messages call the components that take the fields.
    given: the fields that are set.
    fields: all that there are.
    chosen: the components, which say what a missing field means.
  """
  values = {}
  for key, field in fields.items():
    name, value = f"{section}.{key}", given.get(key)
    if value is not None:
      value = field.check(name, value)
    elif key in given and field.optional:
      value = None
    elif field.required:
      texts = [meanings_of(slot.factory(n)).get(key) for slot, n in chosen]
      meaning = field.meaning or next(filter(None, texts), "")
      what = f" ({meaning.rstrip('.')})" if meaning else ""
      raise ValueError(
        f"{', '.join(owners)} lacks the argument {name!r}{what}; give it."
      )
    else:
      value = field.default
    values[key] = _typed(field, value)
  return ConfigDict(values)


def _typed(field: Field, value: Any) -> Any:
  """Return the value as a ConfigDict holds it, so that it keeps its type."""
  if value is None:
    return placeholder(field.kind)
  if field.kind is float:
    return float(value)
  return FieldReference(value, object) if field.kind is object else value


def _labeled(config: ConfigDict, name: str) -> ConfigDict:
  """Return a section of labeled components, such as transforms, complete."""
  given = {k: v for k, v in config[name].items() if v is not None}
  ordered = _ORDER in _defaults()[name]
  if ordered and _ORDER not in config[name]:
    raise ValueError(
      f"{name}.{_ORDER} is missing; let the config begin with default_config()."
    )
  order = given.pop(_ORDER, None) if ordered else None
  for label, section in given.items():
    if not isinstance(section, ConfigDict):
      raise TypeError(
        f"{name}.{label}={section!r} is no section; set the fields of a"
        f" {name.removesuffix('s')}."
      )
  if order:
    order = Field(tuple).check(f"{name}.{_ORDER}", order)
    order = tuple(x for x in order if x in given or x not in config[name])
  order = tuple(order or given)
  if sorted(order) != sorted(given):
    raise ValueError(
      f"{name}.{_ORDER}={order} is no order of the {name}"
      f" {', '.join(given) or '(none)'}; name each of them once."
    )
  result: dict[str, Any] = {_ORDER: order} if ordered else {}
  for label in order:
    result[label] = _component(labeled_slot(name, label), label, given[label])
  return ConfigDict(result)


def _component(slot: Slot, label: str, given: ConfigDict) -> ConfigDict:
  """Return the section of a labeled component, complete."""
  values = dict(given)
  choice = Field(str).check(slot.field, values.pop(slot.key, None) or label)
  taken = slot.own_fields(choice)
  for own in (slot.key, *slot.common):
    if own in taken:
      raise ValueError(
        f"{slot.field}={choice!r} has a parameter {own!r}, and {slot.section}"
        f".{own} is something else; give the parameter another name."
      )
  fields = slot.fields(choice)
  owner = f"{slot.section}" if choice == label else f"{slot.field}={choice!r}"
  for key in values:
    if key not in fields and values[key] is not None:
      raise validate.UnknownNameError(
        validate.not_taken(owner, key, [*fields], slot.section, [])
      )
  filled = _filled(slot.section, [owner], values, fields, [(slot, choice)])
  return ConfigDict({slot.key: choice, **filled})


def reference_fields(config: ConfigDict) -> dict[str, Any]:
  """Return the fields that may refer to a user's own code, with their values.

  Those of trackers are not among them: they change no result.

  Args:
    config: complete.
  """
  slots = [s for s in SLOTS if s.references]
  slots += [
    labeled_slot(section, label)
    for section in ("transforms", "downlink")
    for label in config[section].order
  ]
  sections = [(slot, section_of(config, slot.section)) for slot in slots]
  found = {s.field: given[s.key] for s, given in sections if s.key in given}
  return {**found, "model.metrics": config.model.metrics}
