"""Check, compare and resolve the fields of any config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedjax_sim.config.defaults import default_config
from fedjax_sim.core import validate


def resolved(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON holds it.

  Raises:
    TypeError: a field holds something else; names it.
  """
  for field, value in fields_of(config):
    try:
      json.dumps(value)
    except TypeError as error:
      raise TypeError(
        f"{field} holds a {type(value).__name__}; a config holds numbers,"
        " texts, bools, None and tuples of them."
      ) from error
  plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
  return plain


def fields_of(
  config: ConfigDict, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  """Every "section.field" and its value."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from fields_of(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """The fields in which two resolved configs differ, with both values."""
  x, y = (dict(fields_of(ConfigDict(tree))) for tree in (a, b))
  return validate.differences(x, y)


_SEEDS = (
  "seed",
  "data.seed",
  "privacy.noise_seed",
)  # they have bounds of their own
MOST_WHOLE = 2**31 - 1


def _fits_float32(value: float) -> bool:
  """Whether float32 holds it, and not as 0 or infinity."""
  limits = np.finfo(np.float32)
  return value == 0 or float(limits.tiny) <= abs(value) <= float(limits.max)


def check_fields(config: ConfigDict) -> None:
  """Refuses missing fields, fields nobody reads, and unwieldy numbers.

  Raises:
    TypeError, ValueError: names the field.
  """
  default = default_config()
  wanted, given = dict(fields_of(default)), dict(fields_of(config))
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
    if whole and value > MOST_WHOLE and field not in _SEEDS:
      raise ValueError(
        f"{field}={value} is out of range; give at most {MOST_WHOLE}."
      )
    if isinstance(value, float) and not _fits_float32(value):
      raise ValueError(
        f"{field}={value} is out of range; give 0 or a finite number that"
        " float32 holds."
      )
