"""Checks of what users' functions return.

Messages name the function, describe what it returned, and give an expression of
what is expected. Functions are traced, not run: checks see shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core.metric_names import STATISTICS

COLUMNS = ("client", "examples")  # of client tables, besides metrics
METRIC = "Metric(total=value * weight, weight=weight)"


def named(role: str, function: Callable[..., Any]) -> str:
  """Return a function's name for messages, such as "the loss 'focal'"."""
  name = getattr(function, "__name__", type(function).__name__)
  return f"the {role} {name!r}"


def described(value: Any) -> str:
  """Describe a value in words."""
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"an array, {value.dtype} of shape {tuple(value.shape)}"
  if isinstance(value, Mapping):
    return f"a {type(value).__name__} of {', '.join(map(repr, value))}"
  if isinstance(value, tuple | list):
    return f"a {type(value).__name__} of {len(value)}"
  return "None" if value is None else f"a {type(value).__name__}, {value!r}"


def parts(
  what: str, value: Any, names: tuple[str, ...], example: str
) -> tuple[Any, ...]:
  """Return the elements of a tuple with expected names.

  Args:
    what: name of the function that returned it, for messages.
    value: its return value.
    names: names of the elements.
    example: expression of an expected value.

  Raises:
    TypeError: not a tuple of that length, or a named tuple with other names.
  """
  fits = isinstance(value, tuple | list) and len(value) == len(names)
  if not fits or getattr(value, "_fields", names) != names:
    raise TypeError(
      f"{what} returned {described(value)}; let it return"
      f" {' and '.join(names)}, for example {example}."
    )
  return tuple(value)


def per_example(what: str, array: Any, shape: tuple[int, ...]) -> None:
  """Refuse an array that would broadcast against the padding mask.

  Raises:
    TypeError: not an array of real numbers.
    ValueError: the shape is not `shape`.
  """
  try:
    dtype = jnp.result_type(array)
  except TypeError as error:
    raise TypeError(
      f"{what} is {described(array)}; give an array, one number an example."
    ) from error
  if not jnp.issubdtype(dtype, jnp.number) and dtype != jnp.bool:
    raise TypeError(f"{what} has dtype {dtype}; give numbers.")
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise TypeError(
      f"{what} has dtype {dtype}; give real numbers, for example"
      " jnp.abs(value)."
    )
  if jnp.shape(array) != shape:
    why = " The engine takes the mean itself." if not jnp.shape(array) else ""
    raise ValueError(
      f"{what} has shape {jnp.shape(array)}; give one number an example,"
      f" shape {shape}.{why}"
    )


def alike(what: str, tree: Any, like: Any, example: str) -> None:
  """Refuse a tree whose structure, shapes or dtypes differ from `like`.

  Raises:
    TypeError: names the first leaf that differs.
  """
  kind = lambda x: f"{jnp.result_type(x)} {jnp.shape(x)}"
  if (found := first_difference(tree, like, kind)) is not None:
    name, one, other = found
    raise TypeError(
      f"{what} has {one} at {name or 'the top'}, and it was {other}; keep"
      f" structure, shapes and dtypes, for example {example}."
    )


def first_difference(
  tree: Any, like: Any, kind: Callable[[Any], str]
) -> tuple[str, str, str] | None:
  """Return the first leaf of a kind that differs; None if there is none.

  Args:
    tree: any pytree.
    like: what it should be like.
    kind: leaf -> what is compared of it, such as its dtype and shape.

  Returns:
    Its path, "" for a tree that is a leaf; its kind in `tree` and in `like`,
    "nothing" where it is missing.
  """
  found, wanted = (
    {
      jax.tree_util.keystr(path): kind(x)
      for path, x in jax.tree_util.tree_leaves_with_path(part)
    }
    for part in (tree, like)
  )
  for name in (*wanted, *found):
    one, other = (leaves.get(name, "nothing") for leaves in (found, wanted))
    if one != other:
      return name, one, other
  return None


def loss(
  value: Any, shape: tuple[int, ...], buffers: Any
) -> tuple[Any, Any, Any]:
  """Return value, weight and buffers of what `Task.loss` returned.

  Args:
    value: its return value.
    shape: shape of the padding mask, (batch,).
    buffers: the buffers before the batch.

  Raises:
    TypeError, ValueError: not a `Loss` of floats with these shapes.
  """
  value, weight, new = parts(
    "Task.loss",
    value,
    ("value", "weight", "buffers"),
    "Loss(value, jnp.ones_like(value), variables.buffers)",
  )
  per_example("Task.loss: value", value, shape)
  per_example("Task.loss: weight", weight, shape)
  if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
    raise TypeError(
      f"Task.loss: value has dtype {jnp.result_type(value)}, which has no"
      " gradient; give floats."
    )
  example = "variables.buffers where none change"
  alike("Task.loss: buffers", new, buffers, example)
  return value, weight, new


def check_name(what: str, name: Any) -> None:
  """Refuse a metric name that reports use for something else.

  Raises:
    TypeError: not a string.
    ValueError: empty or reserved.
  """
  if not isinstance(name, str):
    raise TypeError(f"{what}: the name {name!r} is no text; give one.")
  *_, last = pieces = name.split("/")
  if not all(piece.strip() for piece in pieces) or name != name.strip():
    raise ValueError(
      f"{what}: the name {name!r} is empty, or a part of it is; give one such"
      " as 'error'."
    )
  if name in COLUMNS or last in STATISTICS:
    taken = ", ".join((*COLUMNS, *(f".../{x}" for x in STATISTICS)))
    raise ValueError(
      f"{what}: the name {name!r} is taken, as are {taken}, which reports use"
      " themselves; rename the metric."
    )


def metrics(
  what: str,
  value: Any,
  shape: tuple[int, ...] | None = None,
  joint: Container[str] = (),
) -> dict[str, Any]:
  """Return metrics as a dictionary, name -> `Metric` or `PerExample`.

  Args:
    what: name of the function that returned them, for messages.
    value: its return value.
    shape: shape of the padding mask, (batch,); None to ignore shapes.
    joint: names of those that are a `PerExample`; all others are a `Metric`.

  Raises:
    TypeError, ValueError: not a mapping of such with this shape, or a name is
      reserved.
  """
  if not isinstance(value, Mapping):
    raise TypeError(
      f"{what} returned {described(value)}; let it return a dictionary, for"
      f" example {{'error': {METRIC}}}."
    )
  for name, metric in value.items():
    check_name(what, name)
    if name in joint:
      _check_values(f"{what}: {name!r}", metric, shape)
      continue
    if getattr(metric, "_fields", None) != ("total", "weight"):
      raise TypeError(
        f"{what} returned {described(metric)} as {name!r}; give {METRIC}, with"
        " weight = jnp.ones_like(value) where all examples count the same."
      )
    if shape is not None:
      per_example(f"{what}: total of {name!r}", metric.total, shape)
      per_example(f"{what}: weight of {name!r}", metric.weight, shape)
  return dict(value)


def _check_values(
  what: str, metric: Any, shape: tuple[int, ...] | None
) -> None:
  """Refuse what is no `PerExample` with values of every example."""
  example = "PerExample({'score': score, 'y': examples['y']})"
  if getattr(metric, "_fields", None) != ("values",):
    raise TypeError(
      f"{what} is {described(metric)}, and Task.joint has its number; give"
      f" {example}."
    )
  if shape is None:
    return
  for path, x in jax.tree_util.tree_leaves_with_path(metric.values):
    if jnp.shape(x)[:1] != shape:
      raise ValueError(
        f"{what} has shape {jnp.shape(x)} at"
        f" {jax.tree_util.keystr(path) or 'the top'}; give values of every"
        f" example, shape ({shape[0]}, ...)."
      )
