"""What a model says of examples as they are stored, outside of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_sim.core import PyTree, Task, Variables, validate
from fedjax_sim.data import FederatedDataset

_WHOLE = "whole numbers"
_KINDS = {"b": "bools", "i": _WHOLE, "u": _WHOLE, "f": "floats"}


def predict(
  task: Task,
  variables: Variables,
  data: FederatedDataset,
  examples: Mapping[str, Any],
  *,
  batch_size: int = 256,
) -> Any:
  """Return the model's outputs for examples as they are stored.

  Before the model gets them, `data.prepare` does to them what it does in the
  engine: bytes become floats, ids are looked up, inputs are normalized, padded
  and reshaped. `data.augment` does nothing here.

  Args:
    task: what was trained, with `Task.logits`.
    variables: of the model, such as `algorithm.variables(state.server)`.
    data: what it was trained on.
    examples: field -> (examples, ...), such as `data.test`, or new ones of the
      same kind; only the fields that the model reads, such as "x".
    batch_size: how many go through the model at once, at most.

  Returns:
    `Task.logits` of all examples, shape=(examples, ...), on the host.

  Raises:
    TypeError: variables are no Variables, or examples no mapping.
    ValueError: the task has no logits, or a field is not stored like this:
      there is none of this name, it has another shape, or is of another kind,
      as inputs are that were normalized already.
  """
  return Predictor(task, data)(variables, examples, batch_size=batch_size)


class Predictor:
  """`predict` of a task and its data, which compiles a size of batch once.

  Args:
    task: what was trained, with `Task.logits`.
    data: what it was trained on.

  Raises:
    ValueError: the task has no logits.
  """

  def __init__(self, task: Task, data: FederatedDataset):
    logits = task.logits
    if logits is None:
      raise ValueError(
        "predict needs a task that tells its logits; give it Task.logits, or"
        " make it by nnx_task or linen_task."
      )
    self._stored = data.train.examples
    self.outputs = lambda model, batch: logits(model, data.prepare(batch))
    self._jitted = jax.jit(self.outputs)

  def __call__(
    self,
    variables: Variables,
    examples: Mapping[str, Any],
    *,
    batch_size: int = 256,
  ) -> Any:
    """Return the model's outputs for examples, as `predict` does."""
    validate.integer("batch_size", batch_size)
    if not isinstance(variables, Variables):
      raise TypeError(
        f"predict: variables are a {type(variables).__name__}; give Variables,"
        " as Task.init and load(...).variables are, not the params alone."
      )
    if not isinstance(examples, Mapping):
      raise TypeError(
        f"predict: examples are a {type(examples).__name__}; give"
        ' field -> array, such as {"x": x}.'
      )
    given = {
      field: _as_stored(field, np.asarray(x), self._stored)
      for field, x in examples.items()
    }
    count = validate.arrays("predict", given)
    if not count:
      raise ValueError("predict: there is no example; give one at least.")
    size = min(batch_size, count)
    found: list[PyTree] = []
    for first in range(0, count, size):
      rows = np.minimum(np.arange(first, first + size), count - 1)
      batch = {field: x[rows] for field, x in given.items()}
      found.append(jax.device_get(self._jitted(variables, batch)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)


def _as_stored(
  field: str, x: np.ndarray, stored: Mapping[str, np.ndarray]
) -> np.ndarray:
  """Return a field in the dtype in which the data has it."""
  like = validate.lookup("predict: field", field, stored)
  kind, wanted = (_KINDS.get(a.dtype.kind, a.dtype.name) for a in (x, like))
  if kind != wanted or x.shape[1:] != like.shape[1:]:
    raise ValueError(
      f"predict: field {field!r} holds {kind} of shape {x.shape[1:]}, and the"
      f" data stores {wanted} of shape {like.shape[1:]}; give examples as they"
      " are stored, before anything is done to them."
    )
  validate.representable(f"predict: field {field!r}", x, like.dtype)
  return x.astype(like.dtype)
