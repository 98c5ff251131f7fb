"""What attacks on labels have in common."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fedjax_sim.core import Array, Examples, validate


def need_classes(num_classes: int) -> None:
  """Refuse data without classes.

  Raises:
    ValueError: there are fewer than two.
  """
  if num_classes < 2:
    raise ValueError(
      f"attack.name changes labels of classes, and data.name has {num_classes}"
      " classes; take another attack, or labelled data."
    )


def class_number(field: str, value: Any, num_classes: int) -> int:
  """Return the number of a class.

  Raises:
    TypeError, ValueError: there is none such.
  """
  return validate.integer(field, value, ge=0, le=num_classes - 1)


def labels_of(examples: Examples) -> Array:
  """Return the labels of a batch, shape=(batch,), integers.

  Raises:
    ValueError: there are none, or not one an example.
  """
  y = examples.get("y")
  if y is None or y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
    found = "none" if y is None else f"{y.dtype} {y.shape[1:]}"
    raise ValueError(
      "attack.name takes one label 'y' an example, a class, and data.name has"
      f" {found}; take another attack."
    )
  return y
