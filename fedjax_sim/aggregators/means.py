"""How a cohort's updates become one: streaming sums and stacked medians.

A streaming aggregator keeps one accumulator of the parameters' size whatever
the cohort's size; a stacked one keeps every client's update, which robust
statistics need.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Aggregator, Array, PyTree, Roll, references


def _accumulator_dtype(x: Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)


def zeros_accumulator(update: PyTree) -> PyTree:
  """Zeros of the update's shapes, in float32 at least."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, _accumulator_dtype(x)), update
  )


def exact_accumulator(update: PyTree) -> PyTree:
  """The same for a sum, in which whole numbers stay whole, int32 at least."""

  def zeros(x: Array) -> Array:
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    dtype = jnp.promote_types(x.dtype, jnp.int32 if whole else jnp.float32)
    return jnp.zeros(x.shape, dtype)

  return jax.tree.map(zeros, update)


def add_weighted(
  acc: PyTree, updates: PyTree, weights: Array, present: Array
) -> PyTree:
  """Adds sum over lanes of `weight * update`; absent lanes add exactly 0.

  Args:
    acc: accumulator as `zeros_accumulator` makes it.
    updates: leaves (lanes, ...).
    weights: shape=(lanes,), float.
    present: shape=(lanes,), bool. `where` and not a product, since an absent
      lane may hold NaN.
  """

  def add(a: Array, u: Array) -> Array:
    shape = (-1,) + (1,) * (u.ndim - 1)
    u = u.astype(a.dtype) * weights.reshape(shape).astype(a.dtype)
    here = jnp.where(present.reshape(shape), u, 0)
    return a + jnp.sum(here, axis=0, dtype=a.dtype)

  return jax.tree.map(add, acc, updates)


def divide(acc: PyTree, count: Array) -> PyTree:
  """`acc / count`, and 0 where count is 0."""
  safe = jnp.where(count > 0, count, 1)
  return jax.tree.map(lambda a: a / safe.astype(a.dtype), acc)


def weighted_mean() -> Aggregator:
  """The mean of updates, weighted by what clients report (FedAvg)."""
  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=lambda acc, u, w, present, slot: add_weighted(acc, u, w, present),
    finish=lambda acc, weight, count: divide(acc, weight),
    weighted_mean=True,
  )


def mean() -> Aggregator:
  """The plain mean of updates, every client counting the same."""
  return Aggregator(
    init=lambda update, capacity: zeros_accumulator(update),
    add=lambda acc, u, w, present, slot: add_weighted(
      acc, u, jnp.ones_like(w), present
    ),
    finish=lambda acc, weight, count: divide(acc, count),
  )


def sum_() -> Aggregator:
  """The plain sum of updates, whatever their weights; whole numbers stay so."""
  return Aggregator(
    init=lambda update, capacity: exact_accumulator(update),
    add=lambda acc, u, w, present, slot: add_weighted(
      acc, u, jnp.ones_like(w), present
    ),
    finish=lambda acc, weight, count: acc,
  )


def _empty_stack(update: PyTree, capacity: int) -> PyTree:
  """(stack, leaves (capacity, ...); which rows are filled)."""
  stack = jax.tree.map(
    lambda x: jnp.zeros((capacity, *x.shape), x.dtype), update
  )
  return stack, jnp.zeros((capacity,), bool)


def _put_wave(
  acc: PyTree, updates: PyTree, weights: Array, present: Array, slot: Array
) -> PyTree:
  """Writes a wave's rows, those of absent clients, too."""
  del weights
  stack, filled = acc
  write = lambda s, u: lax.dynamic_update_slice_in_dim(s, u, slot, 0)
  return jax.tree.map(write, stack, updates), write(filled, present)


def _filled_rows(filled: Array, s: Array, other: float) -> Array:
  """A stacked leaf with `other` in the rows that nobody has filled."""
  return jnp.where(filled.reshape((-1,) + (1,) * (s.ndim - 1)), s, other)


def median() -> Aggregator:
  """The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498).

  Robust to fewer than half of the clients; ignores weights. Keeps every
  client's update: memory is cohort x parameters.
  """

  def finish(acc: PyTree, weight: Array, count: Array) -> PyTree:
    del weight
    stack, filled = acc

    def middle(s: Array) -> Array:
      # Absent rows sort to the end; the two middle ranks of the rest follow.
      s = jnp.sort(_filled_rows(filled, s, jnp.inf), axis=0)
      last = jnp.maximum(count - 1, 0)
      low = lax.dynamic_index_in_dim(s, last // 2, 0, keepdims=False)
      high = lax.dynamic_index_in_dim(s, (last + 1) // 2, 0, keepdims=False)
      both = (low + high.astype(_accumulator_dtype(s))) / 2
      return jnp.where(count > 0, both, 0)

    return jax.tree.map(middle, stack)

  return Aggregator(
    _empty_stack, _put_wave, finish, stacked=True, by_coordinate=True
  )


def stack() -> Aggregator:
  """All updates, one below the other, for algorithms that join them.

  Keeps every client's update: memory is cohort x parameters, dealt over the
  devices. Rows that nobody has filled are 0.
  """

  def finish(acc: PyTree, weight: Array, count: Array) -> PyTree:
    del weight, count
    updates, filled = acc
    return jax.tree.map(lambda s: _filled_rows(filled, s, 0), updates)

  return Aggregator(_empty_stack, _put_wave, finish, stacked=True, joins=False)


AGGREGATORS = {
  "weighted_mean": weighted_mean,
  "mean": mean,
  "sum": sum_,
  "median": median,
  "stack": stack,
}


def check(aggregator: Aggregator, update: PyTree) -> None:
  """Refuses an aggregator that does not keep to its contract's shapes.

  A round would broadcast some of them, and be wrong in silence.

  Args:
    aggregator: the aggregator; traced, not run.
    update: of one client, shapes and dtypes.

  Raises:
    ValueError: names the function, and the first leaf that is wrong.
  """
  capacity, lanes = 4, 2

  def shape(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)

  wave = jax.tree.map(lambda x: shape(lanes, *x.shape, dtype=x.dtype), update)
  weights, present = shape(lanes), shape(lanes, dtype=jnp.bool)
  count = shape(dtype=jnp.int32)
  place: tuple[Any, ...] = (count,)
  told: tuple[Any, ...] = ()
  if aggregator.keyed:
    hparams = jax.tree.map(lambda _: shape(), aggregator.hparams)
    seats: Any = count
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    told = (Roll(key, seats, hparams, key),)
    place = shape(lanes, dtype=jnp.int32), *told
  part = "init"
  try:
    acc = jax.eval_shape(lambda: aggregator.init(update, capacity))
    part = "add"
    new = jax.eval_shape(aggregator.add, acc, wave, weights, present, *place)
    part = "finish"
    joined = jax.eval_shape(aggregator.finish, acc, shape(), count, *told)
  except Exception as error:
    text = references.raised(None, error)
    raise ValueError(f"server.aggregator: {part}: {text}") from error
  _check_alike("add", new, acc, "as init does")
  if aggregator.joins:  # of whatever float: the server casts it
    _check_alike("finish", joined, update, "as an update has", dtypes=False)
    for leaf in jax.tree.leaves(joined):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
          f"server.aggregator: finish returns {leaf.dtype}; let it return"
          " floats."
        )


def _check_alike(
  part: str, made: PyTree, like: PyTree, why: str, dtypes: bool = True
) -> None:
  found, wanted = (
    {
      jax.tree_util.keystr(path): f"{x.dtype.name if dtypes else ''}{x.shape}"
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (made, like)
  )
  for name in (*wanted, *found):
    one, other = (leaves.get(name, "nothing") for leaves in (found, wanted))
    if one != other:
      raise ValueError(
        f"server.aggregator: {part} gives {one} at {name or 'the top'}; let it"
        f" give {other}, {why}."
      )
