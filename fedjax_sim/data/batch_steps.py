"""Steps applied to each batch on the device, traced by JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedjax_sim.data.federated import Examples

Prepare = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # of a batch
# (key, examples of a batch as `prepare` leaves them) -> the same, changed
Augment = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]


def as_stored(examples: Mapping[str, Any]) -> Mapping[str, Any]:
  """Return the examples as they are."""
  return examples


def prepared(examples: Mapping[str, Any], x: Any) -> dict[str, Any]:
  """Return the examples with this `x`, and integer labels `y` as int32."""
  out = {**examples, "x": x}
  if "y" in out and out["y"].dtype.kind in "iu":
    out["y"] = out["y"].astype(np.int32)
  return out


def prepared_shapes(prepare: Prepare, examples: Examples) -> dict[str, Any]:
  """Return the shapes and dtypes that `prepare` gives for one example.

  Args:
    prepare: see `FederatedDataset`.
    examples: field -> (examples, ...), as they are stored.

  Returns:
    field -> `jax.ShapeDtypeStruct`, shape=(1, ...).

  Raises:
    ValueError: `prepare` cannot be traced.
  """
  import jax  # here, as data that are stored as they are do without

  one = {
    field: jax.ShapeDtypeStruct(
      (1, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
    )
    for field, x in examples.items()
  }
  try:
    return dict(jax.eval_shape(prepare, one))
  except Exception as error:
    text = " ".join(str(error).split())
    raise ValueError(
      f"prepare fails on a batch of one example: {type(error).__name__}: {text}"
    ) from error


def input_shape(prepare: Prepare, examples: Examples) -> tuple[int, ...]:
  """Return `FederatedDataset.example_shape`; () if there is no field "x"."""
  if "x" not in examples:
    return ()
  if prepare is as_stored:
    return examples["x"].shape[1:]
  x = prepared_shapes(prepare, examples).get("x")
  return () if x is None else tuple(x.shape[1:])


def from_bytes(examples: Mapping[str, Any]) -> dict[str, Any]:
  """Scale `x`, bytes, to float32 from 0 to 1; make integer labels int32."""
  return prepared(examples, examples["x"].astype(np.float32) / 255)


def normalize(
  examples: Mapping[str, Any], *, mean: np.ndarray, stddev: np.ndarray
) -> dict[str, Any]:
  """Replace `x` by (x - mean) / stddev, in its dtype if that is a float's.

  Args:
    examples: with "x", (batch, ..., channels); whole numbers become float32.
    mean: shape=() or (channels,), float32.
    stddev: the same, > 0.
  """
  import jax.numpy as jnp

  given = examples["x"].dtype
  floats = jnp.issubdtype(given, jnp.floating)
  x = examples["x"].astype(
    jnp.promote_types(given, np.float32) if floats else np.float32
  )
  # As many dimensions as a batch has: JAX can be told to refuse others.
  of_batch = lambda a: a.astype(x.dtype).reshape(
    (1,) * (x.ndim - a.ndim) + a.shape
  )
  x = (x - of_batch(mean)) / of_batch(stddev)
  return {**examples, "x": x.astype(given) if floats else x}


def prepare_numbers(examples: Mapping[str, Any]) -> dict[str, Any]:
  """Convert inputs to float32 and integer labels to int32."""
  return prepared(examples, examples["x"].astype(np.float32))


def prepare_ids(examples: Mapping[str, Any]) -> dict[str, Any]:
  """Convert inputs that are ids, and integer labels, to int32."""
  return prepared(examples, examples["x"].astype(np.int32))
