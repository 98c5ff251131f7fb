"""Statements of config files, as text."""

from __future__ import annotations

import json
from typing import Any


def assignment(field: str, value: Any) -> str:
  """Return the statement that sets a field of `config`.

  Args:
    field: "section.field".
    value: as JSON holds it; lists become tuples.

  Example:
    assignment("server.rounds", 100)  # "config.server.rounds = 100"
  """
  *sections, key = field.split(".")
  place = "config"
  for name in sections:
    place += f".{name}" if name.isidentifier() else f"[{name!r}]"
  return f"{place}.{key} = {literal(value)}"


def literal(value: Any) -> str:
  """Return the text of a value, in which lists are tuples."""
  if isinstance(value, list | tuple):
    inside = ", ".join(map(literal, value))
    return f"({inside},)" if len(value) == 1 else f"({inside})"
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False)
  return repr(value)
