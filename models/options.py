"""What the options of models have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def several(field: str, value: Any, what: str, example: str) -> tuple[Any, ...]:
  """Return `value` as a tuple, if it is a list or tuple.

  Args:
    field: what messages call it.
    value: what was given.
    what: how many of what it should hold, e.g. "two rates".
    example: such a value.

  Raises:
    TypeError: it is neither, such as a single number.
  """
  if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
    return tuple(value)
  raise TypeError(f"{field}={value!r}; give {what}, {example}.")
