"""Frozen parameters and buffers, which nobody trains.

Patterns on their paths say which parameters those are. A path is the
parameter's place in the tree, joined by slashes, such as `layers/0/kernel`; a
pattern is a regular expression that matches its beginning. What is frozen is
one copy a device, is not sent back and takes no optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  PyTree,
  Task,
  Variables,
)
from fedjax_sim.core.tree import paths_of
from fedjax_sim.tasks.precision import check_inexact

BUFFERS, FROZEN = "buffers/", "frozen/"  # before such variables' paths


class KeptBuffers(NamedTuple):
  """What is frozen of a task whose buffers stay as they began.

  Attributes:
    buffers: the model's.
    rest: what was frozen before.
  """

  buffers: PyTree
  rest: PyTree


class Parts(NamedTuple):
  """What is frozen of a task, some of whose parameters a pattern froze.

  Attributes:
    params: the frozen parameters, in the tree of all; None for the others.
    rest: what was frozen before.
  """

  params: PyTree
  rest: PyTree


class AdapterConstants(NamedTuple):
  """What is frozen of a task with adapters, after its parameters.

  Attributes:
    adapters: path of a kernel -> what of its adapter does not train.
    rest: what was frozen before.
  """

  adapters: dict[str, dict[str, Array]]
  rest: PyTree


def named_variables(variables: Variables) -> dict[str, Any]:
  """Return the variables of a model by name, in the order of the leaves.

  A parameter is called by its path, whether or not a pattern froze it. Before
  the path of a buffer is `buffers/`, and before that of what the model itself,
  or an adapter, keeps frozen `frozen/`.

  Args:
    variables: of a task, or their shapes.

  Raises:
    ValueError: two of them have the same name.
  """
  names = paths_of(variables.params)
  names += [BUFFERS + path for path in paths_of(variables.buffers)]
  frozen = variables.frozen
  while isinstance(frozen, (Parts, KeptBuffers, AdapterConstants)):
    if isinstance(frozen, Parts):
      names += paths_of(frozen.params)
    elif isinstance(frozen, KeptBuffers):
      names += [BUFFERS + path for path in paths_of(frozen.buffers)]
    else:
      names += [FROZEN + path for path in paths_of(frozen.adapters)]
    frozen = frozen.rest
  names += [FROZEN + path for path in paths_of(frozen)]
  named = dict(zip(names, jax.tree.leaves(variables), strict=True))
  if len(named) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(
      f"Two variables of the model are called {twice!r}; rename the parameter."
    )
  return named


def matching(field: str, patterns: Sequence[str], params: PyTree) -> list[bool]:
  """Return whether a pattern matches its path, for every parameter.

  Args:
    field: what messages call the patterns.
    patterns: regular expressions.
    params: the parameters, or their shapes.

  Raises:
    TypeError, ValueError: a pattern is none, or matches no parameter.
  """
  return matching_paths(field, patterns, paths_of(params))


def matching_paths(
  field: str,
  patterns: Sequence[str],
  paths: Sequence[str],
  kind: str = "parameter",
) -> list[bool]:
  """Return whether a pattern matches its beginning, for every path.

  Args:
    field: what messages call the patterns.
    patterns: regular expressions.
    paths: names of variables.
    kind: what messages call what the paths lead to.

  Raises:
    TypeError, ValueError: a pattern is none, or matches no path.
  """
  if isinstance(patterns, str):
    raise TypeError(f"{field}={patterns!r} is a text; give a tuple of them.")
  hits = [False] * len(paths)
  for pattern in patterns:
    try:
      found = [re.match(pattern, path) is not None for path in paths]
    except (TypeError, re.error) as error:
      raise ValueError(
        f"{field}={tuple(patterns)!r}: {pattern!r} is no regular expression"
        f" ({error})."
      ) from error
    if not any(found):
      raise ValueError(
        f"{field}={tuple(patterns)!r}: {pattern!r} matches no {kind}; there"
        f" are {', '.join(paths)}."
      )
    hits = [a or b for a, b in zip(hits, found, strict=True)]
  return hits


def with_frozen(task: Task, patterns: Sequence[str]) -> Task:
  """Return the task with some parameters frozen at their initial values.

  Args:
    task: what is trained.
    patterns: patterns of the parameters that are frozen.

  Raises:
    TypeError, ValueError: a pattern is none or matches no parameter, or all
      parameters are frozen.
  """
  field = "model.frozen"
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  frozen = matching(field, patterns, shapes)
  if all(frozen):
    raise ValueError(
      f"{field}={tuple(patterns)!r} freezes all parameters; leave one out."
    )
  return _apart(task, shapes, frozen)


def with_trainable(task: Task, patterns: Sequence[str]) -> Task:
  """Return the task with all parameters frozen but some.

  Args:
    task: what is trained.
    patterns: patterns of the parameters that are not frozen.

  Raises:
    TypeError, ValueError: a pattern is none or matches no parameter, or there
      is none.
  """
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  trained = matching("trainable", patterns, shapes)
  if not any(trained):
    raise ValueError(
      f"trainable={tuple(patterns)!r} leaves nothing to train; there are"
      f" {', '.join(paths_of(shapes))}."
    )
  return _apart(task, shapes, [not hit for hit in trained])


def with_kept_buffers(task: Task) -> Task:
  """Return the task with its buffers frozen at their initial values.

  Clients neither change nor send them, so batch normalization is evaluated with
  the running statistics that the model began with; in training it takes those
  of the batch in any case.

  Args:
    task: what is trained.

  Raises:
    ValueError: it has no buffers.
  """
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  if not jax.tree.leaves(shapes.buffers):
    raise ValueError(
      "model.send_buffers=False: the model has no buffers, such as batch"
      " statistics; leave the field out."
    )

  def init(key: Key) -> Variables:
    params, buffers, rest = task.init(key)
    return Variables(params, frozen=KeptBuffers(buffers, rest))

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    found = task.loss(_with_buffers(variables), examples, key)
    return found._replace(buffers=variables.buffers)

  return _of_whole(task, init, loss, _with_buffers)


def with_frozen_dtype(task: Task, dtype: Any) -> Task:
  """Return the task whose frozen variables are kept in `dtype`, as bfloat16.

  They are rounded once, at the beginning, and computed with in the dtype that
  they had; what trains stays as it is. Around `with_compute_dtype` of the same
  dtype nothing is converted: a device holds no other copy of them.

  Args:
    task: what is trained.
    dtype: of the frozen arrays of float32; single numbers stay float32.

  Raises:
    ValueError: it has no such array, or the task's variables have to be exact.
  """
  check_inexact("runtime.frozen_dtype", task, dtype)
  like = jax.eval_shape(task.init, jax.random.key(0)).frozen
  lowered = lambda x: x.ndim > 0 and x.dtype == jnp.float32
  if not any(map(lowered, jax.tree.leaves(like))):
    raise ValueError(
      f"runtime.frozen_dtype={jnp.dtype(dtype).name!r} is for what is frozen,"
      " and nothing is; set model.frozen or adapter.name, or unset it."
    )

  def init(key: Key) -> Variables:
    begun = task.init(key)
    low = lambda x: x.astype(dtype) if lowered(x) else x
    return begun._replace(frozen=jax.tree.map(low, begun.frozen))

  def whole(variables: Variables) -> Variables:
    back = lambda x, shape: x.astype(shape.dtype)
    return variables._replace(frozen=jax.tree.map(back, variables.frozen, like))

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    return task.loss(whole(variables), examples, key)

  return _of_whole(task, init, loss, whole)


def _with_buffers(variables: Variables) -> Variables:
  """Return the variables with their kept buffers in place."""
  params, _, (buffers, rest) = variables
  return Variables(params, buffers, rest)


def _apart(task: Task, shapes: PyTree, frozen: Sequence[bool]) -> Task:
  """Return the task with its frozen parameters in `Variables.frozen`.

  Args:
    task: what is trained.
    shapes: the shapes of its parameters.
    frozen: for every leaf of them, whether it is frozen.
  """
  treedef = jax.tree.structure(shapes)

  def part(leaves: list[Array], wanted: bool) -> PyTree:
    kept = [
      x if hit == wanted else None
      for x, hit in zip(leaves, frozen, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept)

  def init(key: Key) -> Variables:
    params, buffers, rest = task.init(key)
    leaves = jax.tree.leaves(params)
    frozen = Parts(part(leaves, True), rest)
    return Variables(part(leaves, False), buffers, frozen)

  def whole(variables: Variables) -> Variables:
    params, buffers, (kept, rest) = variables
    pair = [iter(jax.tree.leaves(kept)), iter(jax.tree.leaves(params))]
    leaves = [next(pair[0] if hit else pair[1]) for hit in frozen]
    return Variables(jax.tree.unflatten(treedef, leaves), buffers, rest)

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    return task.loss(whole(variables), examples, key)

  return _of_whole(task, init, loss, whole)


def _of_whole(
  task: Task,
  init: Callable[[Key], Variables],
  loss: Callable[[Variables, Examples, Key], Loss],
  whole: Callable[[Variables], Variables],
) -> Task:
  """Return the task for variables of which `whole` makes those of the task."""

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    return task.metrics(whole(variables), examples)

  def logits(variables: Variables, examples: Examples) -> Array:
    assert task.logits is not None
    return task.logits(whole(variables), examples)

  def features(variables: Variables, examples: Examples) -> Array:
    assert task.features is not None
    return task.features(whole(variables), examples)

  return task._replace(
    init=init,
    loss=loss,
    metrics=metrics,
    logits=None if task.logits is None else logits,
    features=None if task.features is None else features,
  )
