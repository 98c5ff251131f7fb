"""Checks of examples that are sequences of ids: characters, words or tokens."""

from __future__ import annotations

import numpy as np


def check_sequence(owner: str, example_shape: tuple[int, ...]) -> None:
  """Refuse examples that are no sequence of ids.

  Raises:
    ValueError: they have another shape than (time,).
  """
  if len(example_shape) != 1:
    raise ValueError(
      f"{owner}: an example has shape {example_shape}; give (time,) ids."
    )


def check_ids(
  ids: np.ndarray, tokens: int, option: str = "num_classes", field: str = "x"
) -> None:
  """Refuse ids that are not within 0..tokens - 1.

  Args:
    ids: of any shape.
    tokens: how many ids there are.
    option: what says so.
    field: of the examples.

  Raises:
    ValueError: they are not whole, or there is another number.
  """
  if ids.dtype.kind not in "iu":
    raise ValueError(f"{field!r} is {ids.dtype}; give whole numbers, ids.")
  low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
  if low < 0 or high >= tokens:
    raise ValueError(
      f"{field!r} holds {low if low < 0 else high}; {option} says that ids go"
      f" from 0 to {tokens - 1}."
    )
