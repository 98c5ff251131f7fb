"""Checks of a model: what padding does to its loss, gradients and metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import core
from fedjax_sim.contract.blame import blamed
from fedjax_sim.contract.compare import additions, difference
from fedjax_sim.contract.outcome import Failed, NotApplicable, Outcome, Passed
from fedjax_sim.contract.setting import Setting
from fedjax_sim.core import Batch, Examples, PyTree, Variables, returned
from fedjax_sim.core.tree import in_float32
from fedjax_sim.engine.client_loop import with_numbers

_ROWS = 4  # of a batch; the last one is padding
_KEY = functools.partial(core.key_for, 0, core.Purpose.CLIENT)


def _examples(setting: Setting, last: int) -> Examples:
  """Return a batch of the first examples, but for another last row."""
  train = setting.data.train
  rows = [0, 1, 2, last]
  stored = {k: jnp.asarray(v[rows]) for k, v in train.examples.items()}
  numbers = jax.tree.map(jnp.float32, dict(setting.task.hparams))
  return with_numbers(setting.data.prepare(stored), numbers)


def _variables(setting: Setting) -> Variables:
  return setting.task.init(core.key_for(0, core.Purpose.INIT))


def _pair(
  setting: Setting,
  of: Callable[[Variables, Examples], PyTree],
  moved: bool = True,
) -> tuple[PyTree, PyTree]:
  """Return a function's values on batches that differ in their last row.

  Parameters are moved a little: a model of zeros has one loss for all examples.
  """
  variables, compiled = _variables(setting), jax.jit(of)
  rng = np.random.default_rng(0)
  move = lambda x: x + (0.1 * rng.normal(size=x.shape)).astype(x.dtype)
  if moved:
    variables = variables._replace(params=jax.tree.map(move, variables.params))
  last = setting.data.train.num_examples - 1
  batches = (_examples(setting, row) for row in (3, last))
  one, other = (jax.device_get(compiled(variables, each)) for each in batches)
  return one, other


def _terms(setting: Setting) -> float:
  return additions(0, 1, _ROWS, setting.data.example_shape)


def mixes(setting: Setting) -> bool:
  """Return whether the loss of an example depends on others of its batch.

  Args:
    setting: whose task.
  """

  def losses(variables: Variables, examples: Examples) -> PyTree:
    made = setting.task.loss(variables, examples, _KEY())
    parts = returned.loss(made, (_ROWS,), variables.buffers)
    return in_float32(parts[:2])

  pair = _pair(setting, losses)
  one, other = (jax.tree.map(lambda x: x[:-1], each) for each in pair)
  return difference(one, other, _terms(setting)) is not None


def padding(setting: Setting) -> Outcome:
  """Check that masked rows change neither loss nor gradients."""

  def loss(params: PyTree, variables: Variables, examples: Examples) -> PyTree:
    batch = Batch(examples, jnp.array([True] * (_ROWS - 1) + [False]))
    variables = variables._replace(params=params)
    return core.mean_loss(setting.task, variables, batch, _KEY())

  def both(variables: Variables, examples: Examples) -> PyTree:
    take = jax.value_and_grad(loss, has_aux=True)
    (value, _), gradient = take(variables.params, variables, examples)
    return {"loss": value, "gradient": gradient}

  one, other = _pair(setting, both)
  apart = difference(one, other, _terms(setting))
  if apart is None:
    return Passed("loss and gradients are those of the other rows")
  if jax.tree.leaves(_variables(setting).buffers):
    return NotApplicable(
      "the model has buffers, and its loss of an example depends on the rest of"
      " the batch, as with batch statistics; batches are filled up with the"
      " client's own examples"
    )
  return Failed(
    "a batch of 4 rows whose last is masked:"
    f" {apart.sentence('with one example there', 'with another')}. Let"
    " Loss.value and Loss.weight of an example depend on that example alone,"
    " and leave sums and means to the engine."
  )


def all_padding(setting: Setting) -> Outcome:
  """Check that a batch of padding has loss 0, and gradients 0."""

  def loss(params: PyTree, variables: Variables, examples: Examples) -> PyTree:
    batch = Batch(examples, jnp.zeros(_ROWS, bool))
    variables = variables._replace(params=params)
    return core.mean_loss(setting.task, variables, batch, _KEY())

  def both(variables: Variables, examples: Examples) -> PyTree:
    take = jax.value_and_grad(loss, has_aux=True)
    (value, (buffers, _)), gradient = take(
      variables.params, variables, examples
    )
    return {"loss": value, "gradient": gradient}, buffers

  (found, buffers), _ = _pair(setting, both, moved=False)
  nothing = jax.tree.map(np.zeros_like, found)
  apart = difference(found, nothing, 0.0)
  if apart is not None:
    return Failed(
      f"a batch whose rows are all masked: {apart.where} is {apart.one}, and"
      " has to be 0: Loss.value must be finite and differentiable even where"
      " Loss.weight is 0."
    )
  for leaf in jax.tree.leaves(buffers):
    if not np.isfinite(leaf).all():
      return Failed("a batch whose rows are all masked: its buffers are NaN.")
  return Passed("loss 0, gradients 0")


def metrics(setting: Setting) -> Outcome:
  """Check that metrics are finite, and treat each example by itself."""
  task = setting.task

  def of_examples(variables: Variables, examples: Examples) -> PyTree:
    found = task.metrics(variables, examples)
    shape = (_ROWS,)
    return in_float32(
      returned.metrics("Task.metrics", found, shape, task.joint)
    )

  try:
    pair = _pair(setting, of_examples, moved=False)
  except Exception as error:
    return Failed(blamed(error, setting.file))
  for path, leaf in jax.tree_util.tree_leaves_with_path(pair[0]):
    name = jax.tree_util.keystr(path)
    if not np.isfinite(leaf).all():
      return Failed(f"the metric {name} is {leaf} before any training.")
    if getattr(path[-1], "name", "") == "weight" and (leaf < 0).any():
      return Failed(f"the metric {name} is {leaf}; give weights >= 0.")
  one, other = (jax.tree.map(lambda x: x[:-1], each) for each in pair)
  apart = difference(one, other, _terms(setting))
  if apart is not None:
    return Failed(
      "in evaluation an example has other metrics beside another one: the"
      f" metric {apart.sentence('beside one', 'beside another')}, so they would"
      " depend on runtime.eval_batch_size; use running statistics there."
    )
  return Passed(", ".join(pair[0]))


def init(setting: Setting) -> Outcome:
  """Check that what a run begins with follows from its key alone."""
  one, other = (jax.device_get(_variables(setting)) for _ in range(2))
  apart = difference(one, other, 0.0)
  if apart is not None:
    return Failed(
      f"{apart.sentence('at first', 'with the same key again')}: Task.init"
      " draws outside of its key; use jax.random and the key."
    )
  for path, leaf in jax.tree_util.tree_leaves_with_path(one):
    if not np.isfinite(np.asarray(leaf, np.float64)).all():
      return Failed(f"Task.init: {jax.tree_util.keystr(path)} is not finite.")
  size = sum(np.size(x) for x in jax.tree.leaves(one.params))
  return Passed(f"{size:,} parameters, finite, a function of the key")
