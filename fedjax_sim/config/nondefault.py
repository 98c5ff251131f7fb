"""Fields of a config that differ from their defaults, and a file of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fedjax_sim.config.components import LABELED, SLOTS, Slot, labeled_slot
from fedjax_sim.config.defaults import default_config
from fedjax_sim.config.fields import fields_of
from fedjax_sim.config.statements import assignment
from fedjax_sim.core import validate


class Change(NamedTuple):
  """A field that does not have its default.

  Attributes:
    field: "section.field".
    value: as JSON holds it.
    default: as JSON holds it; None also where there is none.
  """

  field: str
  value: Any
  default: Any


def changes(tree: Mapping[str, Any]) -> list[Change]:
  """Return the fields that differ from the defaults of this version.

  Those of a user's own component, whose file is not read, all differ.

  Args:
    tree: a complete config as JSON holds it, also of another version.

  Example:
    changes(resolved(complete(default_config())))  # []
  """
  given = dict(fields_of(ConfigDict(dict(tree))))
  defaults = {k: _plain(v) for k, v in fields_of(default_config())}
  for slot, name in _chosen(tree):
    try:
      fields = slot.fields(name)
    except validate.UnknownNameError:  # of another version
      continue
    for key, field in fields.items():
      if not field.required:
        defaults.setdefault(f"{slot.section}.{key}", _plain(field.default))
  for label in tree.get("transforms", {}):
    for wrapper in ("error_feedback", "ef21"):
      defaults[f"transforms.{label}.{wrapper}"] = False
  for section in ("transforms", "downlink"):
    if not given.get(f"{section}.order"):
      given.pop(f"{section}.order", None)
  nothing = object()
  return [
    Change(field, value, defaults.get(field))
    for field, value in given.items()
    if value != defaults.get(field, nothing)
  ]


def config_file(tree: Mapping[str, Any]) -> str:
  """Return a config file whose `get_config` returns this config.

  Args:
    tree: a complete config as JSON holds it.
  """
  lines = [
    "from ml_collections import ConfigDict",
    "",
    "from fedjax_sim.config import default_config",
    "",
    "",
    'def get_config(arg=""):',
    "  config = default_config()",
  ]
  given = dict.fromkeys(_labels(tree))
  usual = dict.fromkeys(_labels(default_config().to_dict()))
  removed = [x for x in usual if x not in given and x[0] in tree]
  added = [pair for pair in given if pair not in usual]
  lines += [f"  del config.{section}[{label!r}]" for section, label in removed]
  lines += [
    f"  config.{section}[{label!r}] = ConfigDict()" for section, label in added
  ]
  if not added:
    del lines[:2]
  lines += [f"  {assignment(c.field, c.value)}" for c in changes(tree)]
  return "\n".join([*lines, "  return config", ""])


def _labels(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yield the section and the label of every labeled section."""
  for slot in LABELED:
    for label, section in tree.get(slot.section, {}).items():
      if isinstance(section, Mapping):
        yield slot.section, label


def _chosen(tree: Mapping[str, Any]) -> Iterator[tuple[Slot, str]]:
  """Yield the slots that name one of our components, and the name."""
  slots = list(SLOTS)
  slots += [labeled_slot(*pair) for pair in _labels(tree)]
  for slot in slots:
    section: Any = tree
    for part in slot.section.split("."):
      section = section.get(part, {}) if isinstance(section, Mapping) else {}
    if not isinstance(section, Mapping):
      continue
    name = section.get(slot.key)
    if slot.switch and section.get(slot.switch) is None:
      continue
    if isinstance(name, str) and name in slot.registry:
      yield slot, name


def _plain(value: Any) -> Any:
  """Return a value as JSON holds it; None if it holds no such one."""
  try:
    return json.loads(json.dumps(value))
  except TypeError:
    return None
