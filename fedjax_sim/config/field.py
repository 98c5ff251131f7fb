"""One field of a section: its type, its default, and how its text is read."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import numbers
import os
from typing import Any

import numpy as np

from fedjax_sim.config.fields import Text, words

MOST_WHOLE = 2**31 - 1
NAMES = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "a text",
  tuple: "a tuple, such as (1, 2)",
}


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a section.

  Attributes:
    kind: bool, int, float, str, tuple, or object where any value may be given.
    default: its value where none is given; `inspect.Parameter.empty`: one has
      to be given.
    optional: whether None is one of its values.
    unbounded: whether a whole number may be larger than `MOST_WHOLE`.
    meaning: what it is, where no docstring says so.
  """

  kind: type
  default: Any = inspect.Parameter.empty
  optional: bool = False
  unbounded: bool = False
  meaning: str = ""

  @property
  def required(self) -> bool:
    """Whether a value has to be given."""
    return self.default is inspect.Parameter.empty

  def check(self, name: str, value: Any) -> Any:
    """Return the value in the field's type.

    Args:
      name: "section.field", for messages.
      value: as a config file or a flag (`Text`) gives it; not None.

    Raises:
      TypeError: a value of another type.
      ValueError: a number beyond int32 or float32.
    """
    if isinstance(value, Text):
      value = self._read(name, value)
    whole = isinstance(value, numbers.Integral)
    real = isinstance(value, numbers.Real)
    boolean = isinstance(value, bool | np.bool_)
    fits = {
      bool: boolean,
      int: whole and not boolean,
      float: real and not boolean,
      str: isinstance(value, str | os.PathLike),
      tuple: isinstance(value, tuple | list),
      object: True,
    }[self.kind]
    if not fits:
      raise TypeError(
        f"{name}={value!r} is a {type(value).__name__}; give"
        f" {NAMES[self.kind]}."
      )
    if whole and not boolean and value > MOST_WHOLE and not self.unbounded:
      raise ValueError(
        f"{name}={value} is out of range; give at most {MOST_WHOLE}."
      )
    if real and not whole and not _fits_float32(float(value)):
      raise ValueError(
        f"{name}={value} is out of range; give 0 or a finite number that"
        " float32 holds."
      )
    if self.kind is object:
      return value
    return os.fspath(value) if self.kind is str else self.kind(value)

  def _read(self, name: str, text: str) -> Any:
    """Return the value that a text stands for."""
    if self.kind is str:
      return str(text)
    if self.kind is bool:
      values = {"true": True, "1": True, "false": False, "0": False}
      if text.lower() not in values:
        raise ValueError(f"{name}={text}: give true or false.")
      return values[text.lower()]
    if self.kind is float:
      with contextlib.suppress(ValueError):
        return float(text)
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = words(text) if self.kind is tuple else str(text)
    if self.kind is tuple and not isinstance(value, tuple | list):
      return (value,)
    if self.kind in (int, float) and isinstance(value, str):
      raise ValueError(f"{name}={text}: give {NAMES[self.kind]}.")
    return value


def _fits_float32(value: float) -> bool:
  """Return whether float32 holds the value, and not as 0 or infinity."""
  limits = np.finfo(np.float32)
  return value == 0 or float(limits.tiny) <= abs(value) <= float(limits.max)
