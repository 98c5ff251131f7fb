"""Sums over devices: in few messages, or in a fixed order."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import PyTree
from fedjax_sim.distributed.mesh import AXIS, MODEL

MOST_PACKED = 2**17  # numbers of an array that is summed together with others


def packed_psum(tree: PyTree) -> PyTree:
  """Sum over the devices by `psum`, small arrays of one dtype as one array.

  Inside `shard_map`. CPU devices synchronize for every array, which takes
  longer than to add a small one. With an axis `model` arrays are added one by
  one, as their pieces would have to be put together first.
  """
  if lax.axis_size(AXIS) == 1:  # which XLA's partitioner does not take
    return tree
  if MODEL in jax.sharding.get_abstract_mesh().axis_names:
    apart: PyTree = jax.tree.map(lambda x: lax.psum(x, AXIS), tree)
    return apart
  one_row = jax.tree.map(lambda x: x[None], tree)
  return _packed(lambda rows: lax.psum(rows[0], AXIS), one_row)


def ordered_sum(tree: PyTree, count: int) -> PyTree:
  """Sum over shards in their order: the same bits on any number of devices.

  Inside `shard_map`. Every device adds a share of the coordinates.

  Args:
    tree: leaves (shards of this device, ...); devices have equally many.
    count: how many shards, from the first on, are summed.

  Returns:
    The sums, leaves (...).
  """

  def add(rows: jax.Array) -> jax.Array:
    total = functools.reduce(jnp.add, _scatter(rows)[:count])
    return _gather(total)[: rows.shape[1]]

  return _packed(add, tree)


def _packed(join: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
  """Apply `join` to every leaf, to the small ones of a dtype side by side.

  Args:
    join: (rows, n) -> (n,), acting on each coordinate by itself.
    tree: leaves (rows, ...).

  Returns:
    Leaves (...).
  """
  leaves, structure = jax.tree.flatten(tree)
  packs: dict[object, list[int]] = {}
  for i, leaf in enumerate(leaves):
    small = math.prod(leaf.shape[1:]) <= MOST_PACKED
    packs.setdefault(leaf.dtype if small else i, []).append(i)
  for members in packs.values():
    parts = [leaves[i].reshape(len(leaves[i]), -1) for i in members]
    joined = join(jnp.concatenate(parts, axis=1))
    ends = list(itertools.accumulate(x.shape[1] for x in parts))
    for i, part in zip(members, jnp.split(joined, ends[:-1]), strict=True):
      leaves[i] = part.reshape(leaves[i].shape[1:])
  result: PyTree = jax.tree.unflatten(structure, leaves)
  return result


def over_coordinates(
  function: Callable[[PyTree], PyTree], stack: PyTree, like: PyTree
) -> PyTree:
  """Return function(stack of all devices), each device computing a share.

  Inside `shard_map`. A device never holds more than twice its own part of the
  stack.

  Args:
    function: of leaves (rows of all devices, coordinates); its result's leaves
      are (coordinates,), or () of a stack's leaf (rows,).
    stack: leaves (rows of this device, ...); those of one dimension reach
      `function` whole.
    like: the result's shapes.
  """

  def spread(x: jax.Array) -> jax.Array:
    if x.ndim == 1:
      return _gather(x)
    return _scatter(x.reshape(len(x), -1))

  def gather(x: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    if not shape.shape:
      return x
    return _gather(x)[: math.prod(shape.shape)].reshape(shape.shape)

  result: PyTree = jax.tree.map(
    gather, function(jax.tree.map(spread, stack)), like
  )
  return result


def _gather(x: jax.Array) -> jax.Array:
  """Return the devices' shares, end to end."""
  if lax.axis_size(AXIS) == 1:
    return x
  whole: jax.Array = lax.all_gather(x, AXIS, tiled=True)
  return whole


def _scatter(x: jax.Array) -> jax.Array:
  """Exchange (rows, n) for (rows of all devices, this device's share of n).

  n is padded to a multiple of the number of devices.
  """
  if lax.axis_size(AXIS) == 1:
    return x
  missing = -x.shape[1] % lax.axis_size(AXIS)
  padded = jnp.pad(x, ((0, 0), (0, missing)))
  return lax.all_to_all(padded, AXIS, split_axis=1, concat_axis=0, tiled=True)
