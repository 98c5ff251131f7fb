"""Compare and resolve the fields of any config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim.core import validate


class Text(str):
  """A field's value as the command line gives it, to be read by its type."""

  def __repr__(self) -> str:
    return str(self)


def words(text: str) -> tuple[str, ...]:
  """Return the texts of a list without quotes, such as "a, b" or "(a, b)".

  What brackets enclose stays together: texts may be regular expressions.
  """
  text = text.strip()
  if text[:1] == "(" and _depths(text).index(0) == len(text) - 1:
    text = text[1:-1]
  words = [""]
  for letter, depth in zip(text, _depths(text), strict=False):
    if letter == "," and depth == 0:
      words.append("")
    else:
      words[-1] += letter
  return tuple(word.strip() for word in words if word.strip())


def _depths(text: str) -> list[int]:
  """Return how many brackets are open after each letter, and 0 at the end."""
  steps = ((x in "([{") - (x in ")]}") for x in text)
  return [*itertools.accumulate(steps), 0]


def resolved(config: ConfigDict) -> dict[str, Any]:
  """Return the config as JSON holds it.

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
  """Yield every "section.field" and its value."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from fields_of(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Return where two resolved configs differ, with both values."""
  x, y = (dict(fields_of(ConfigDict(tree))) for tree in (a, b))
  return validate.differences(x, y)
