"""What the options of models have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedjax_sim.core import Task

Make = TypeVar("Make", bound=Callable[..., Task])
Files = Callable[[Path], Iterable[Path]]  # of a path
_BEGINS = "begins_from"


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


def begins_from(**paths: Files) -> Callable[[Make], Make]:
  """Mark a model that begins with weights which it reads from files itself.

  A run keeps digests of them, and says when they have changed. The mark is an
  attribute of the function, which a user's own function may have as well.

  Args:
    **paths: parameter of the model's function that holds a path -> a function
      of the path that returns the files.

  Example:
    @begins_from(folder=model_files)
    def hugging_face(example_shape, num_classes, folder): ...
  """

  def mark(make: Make) -> Make:
    setattr(make, _BEGINS, paths)
    return make

  return mark


def weights_of(make: Callable[..., Task]) -> Mapping[str, Files]:
  """Return what `begins_from` has marked; nothing for other models."""
  marked: Mapping[str, Files] = getattr(make, _BEGINS, {})
  return marked
