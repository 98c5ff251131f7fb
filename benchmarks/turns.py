"""The order in which what is compared takes turns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def rotated(items: Iterable[T], turn: int) -> list[T]:
  """Return all items in order, beginning with another one in every turn.

  What runs first in a turn may find the caches and the clock in another state
  than what runs last.
  """
  everything = list(items)
  first = turn % len(everything)
  return everything[first:] + everything[:first]
